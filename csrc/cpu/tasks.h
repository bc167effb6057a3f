// Work in numbered tasks. A task owns what it writes and sums in a fixed order, so results have the same bits
// whatever the number of threads and whichever thread takes a task.
#pragma once

#include <cstdint>

namespace monet::cpu {

// Runs task(context, 0..count-1) on the framework's threads. Defined by the binding.
void run_tasks(int64_t count, void (*task)(const void* context, int64_t index), const void* context);

template <class F>
void for_each_task(int64_t count, const F& f) {
  run_tasks(
      count, [](const void* context, int64_t index) { (*static_cast<const F*>(context))(index); }, &f);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// f(first, end) for 0..count-1 in pieces of `each`, a task each.
template <class F>
void for_each_range(int64_t count, int64_t each, const F& f) {
  for_each_task(
      ceil_div(count, each), [&](int64_t task) { f(task * each, smaller(count, (task + 1) * each)); });
}

}  // namespace monet::cpu
