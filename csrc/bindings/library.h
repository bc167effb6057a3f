// The name under which the operations are registered, torch.ops.monet. The tests build a second library of another
// name, in which the CUDA binding runs on the CPU.
#pragma once

#include <c10/macros/Macros.h>

#ifndef MONET_LIBRARY
#define MONET_LIBRARY monet
#endif
#define MONET_OPERATION(name) C10_STRINGIZE(MONET_LIBRARY) "::" name
