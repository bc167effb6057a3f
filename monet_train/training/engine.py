"""The DeepSpeed engine: ZeRO, mixed precision, gradient accumulation and clipping."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from monet_train.config.schema import TrainConfig
from monet_train.model.experts import Experts
from monet_train.model.transformer import MonetForCausalLM
from monet_train.parallel.groups import Topology
from monet_train.training.optimizers import build_optimizer


def deepspeed_config(config: TrainConfig, data_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run of ours."""
    micro_step = config.train.micro_batch_size * data_size
    bf16 = config.train.precision == "bf16"
    settings: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.global_batch_size // micro_step,
        "gradient_clipping": config.optimizer.clip,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": config.zero.stage},
        "zero_allow_untested_optimizer": True,  # the table of optimizers is ours
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if bf16 and config.zero.stage >= 2:
        # fp32 sums over the micro-steps. Below stage 2 they stay in bf16: DeepSpeed refuses the mix without ZeRO, and
        # in stage 1 answers it with another optimizer, whose gradient norm was seen 2.4 times too large.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def build_engine(model: MonetForCausalLM, config: TrainConfig, topology: Topology) -> Any:
    """Wrap ``model`` and a fresh optimizer in a ``DeepSpeedEngine``. Every rank calls it."""
    if next(model.parameters()).device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # On the CPU DeepSpeed would compile its own shared-memory collectives at first start: half a minute and a
    # compiler for what gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    if config.zero.stage == 3:
        _register_expert_weights(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config.optimizer),
        config=deepspeed_config(config, topology.data_size),
        mpu=topology,
        dist_init_required=False,
    )
    _clip_in_double(engine, topology)
    _forget_initial_step(engine)
    if config.train.compile:
        # The forward pass without DeepSpeed's hooks, which read clocks and would break the graph. One graph or an
        # error: several would gain nothing, and nobody would notice.
        engine.module.forward = torch.compile(engine.module.forward, fullgraph=True)
    return engine


def _clip_in_double(engine: Any, topology: Topology) -> None:
    # Without ZeRO and in fp32 DeepSpeed clips with a norm summed in fp32, which was seen 4e-5 off on an embedding of
    # half a million entries, and does not keep it. ZeRO sums in fp64; so does this, and the runs agree.
    from deepspeed.runtime.utils import is_model_parallel_parameter

    @torch.no_grad()
    def clip() -> None:
        gradients = [(p, p.grad) for p in engine.module.parameters() if p.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=engine.device)
        for parameter, gradient in gradients:
            if topology.tensor_rank == 0 or is_model_parallel_parameter(parameter):
                squares += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        torch.distributed.all_reduce(squares, group=topology.tensor_group)
        norm = squares.sqrt()
        scale = (engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0).float()
        for _, gradient in gradients:
            gradient.mul_(scale)
        engine._global_grad_norm = norm

    engine.clip_fp32_gradients = clip


def _forget_initial_step(engine: Any) -> None:
    # Without ZeRO and in bf16 DeepSpeed's wrapper takes one optimizer step on zero gradients to allocate the state and
    # leaves Adam's step count at 1, which halves the first update.
    if engine.zero_optimization_stage() == 0 and engine.bfloat16_enabled():
        for state in engine.basic_optimizer.state.values():
            if "step" in state:
                state["step"].zero_()


def _register_expert_weights(model: MonetForCausalLM) -> None:
    # ZeRO-3 gathers the parameters of a module when its forward is called; the kernels take the weights of the
    # projections without calling them, so their owner has to announce them.
    import deepspeed

    for module in model.modules():
        if isinstance(module, Experts):
            for child in module.children():
                for parameter in child.parameters():
                    deepspeed.zero.register_external_parameter(module, parameter)


def set_learning_rate(engine: Any, value: float) -> None:
    """Set the learning rate of every parameter group for the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def gradient_norm(engine: Any) -> float:
    """Global gradient norm of the last optimizer step, before clipping."""
    return float(torch.as_tensor(engine.get_global_grad_norm()))
