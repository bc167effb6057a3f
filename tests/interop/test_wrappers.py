"""What else wraps or replaces the modules of an export: other adapters, parametrizations, sharding, compilation."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune
from transformers import AutoModel

from monet_train import ExpertSet, load_pretrained, save_pretrained
from monet_train.errors import UserError
from monet_train.interop.generate import Sampling, generate_tokens
from monet_train.model.identity import identify
from tests.interop.test_huggingface import deviation, load
from tests.interop.test_peft import IDS, logits, optional, train

pytestmark = pytest.mark.slow

EXPERTS = ["u1", "u2", "v11", "v12", "v21", "v22", "u", "v"]
BIASES = ["b1", "b2", "b"]


def adapters() -> dict[str, Callable[[Any], Any]]:
    """Configurations by name, from peft."""
    return {
        "dora": lambda peft: peft.LoraConfig(target_modules="all-linear", r=4, use_dora=True),
        "biases": lambda peft: peft.LoraConfig(target_modules=["q_proj"], target_parameters=BIASES, r=4),
        "ia3": lambda peft: peft.IA3Config(target_modules=[*EXPERTS, "q_proj"], feedforward_modules=EXPERTS),
        "loha": lambda peft: peft.LoHaConfig(target_modules=EXPERTS, r=4),
        "experts": lambda peft: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["moe"], r=4),
        "prefix": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }


@pytest.mark.parametrize("name", adapters())
def test_any_adapter_trains_is_restored_and_merges(export: Path, tmp_path: Path, name: str) -> None:
    peft = optional("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(load(export), adapters()[name](peft))
    train(model, steps=3)
    trained = logits(model)
    assert deviation(trained, logits(load(export))) > 0.01
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(export), tmp_path)), trained)
    if name != "prefix":
        assert deviation(logits(model.merge_and_unload()), trained) < 1e-4


def test_parametrizations_reach_every_weight_and_bias(export: Path) -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x

    model = load(export)
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        for name in BIASES:
            if hasattr(layer.moe, name):
                getattr(layer.moe, name).data.normal_()
                parametrize.register_parametrization(layer.moe, name, Zero())
        layer.moe.register_forward_hook(lambda *of: outputs.append(of[2]))
    logits(model)
    assert all(output.any() for output in outputs)
    outputs.clear()
    for layer in model.model.layers:
        for name, projection in layer.moe.named_children():
            if name.startswith("v"):
                parametrize.register_parametrization(projection, "weight", Zero())
    logits(model)
    assert len(outputs) == 4 and not any(output.any() for output in outputs)


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    if distributed.is_initialized():
        pytest.skip("a process group is up already")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_fully_sharded_projections_and_layers_compute_the_same(export: Path, one_process_group: None) -> None:
    plain, sharded = load(export), load(export)
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.model.layers:
        for projection in layer.moe.children():
            fully_shard(projection, mesh=mesh)  # gathers its weights when it is called, and not otherwise
        fully_shard(layer.moe, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert torch.equal(logits(sharded), logits(plain))
    for model in (plain, sharded):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in sharded.named_parameters():
        assert deviation(parameter.grad.full_tensor(), gradients[name]) < 1e-6, name


def lora(model: nn.Module, **options: Any) -> nn.Module:
    return optional("peft").get_peft_model(model, optional("peft").LoraConfig(r=4, **options))


def on_routers(change: Callable[..., object]) -> Callable[[Any], nn.Module]:
    """Change the weights of the routers' projections."""

    def changed(model: Any) -> nn.Module:
        for layer in (0, 2):
            for projection in (model.model.layers[layer].router.w1, model.model.layers[layer].router.w2):
                change(projection, "weight")
        return model

    return changed


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "lora": lambda model: lora(model, target_modules="all-linear"),
    "lora of a causal model": lambda model: lora(model, target_modules="all-linear", task_type="CAUSAL_LM"),
    "saved routers": lambda model: lora(model, target_modules=["q_proj"], modules_to_save=["router"]),
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compiled lora": lambda model: torch.compile(lora(model, target_modules="all-linear"), backend="eager"),
    "data parallel": nn.DataParallel,
    "pruned routers": on_routers(prune.identity),
    "parametrized routers": on_routers(lambda module, name: parametrize.register_parametrization(module, name, Same())),
    "offloaded": lambda model: optional("accelerate").cpu_offload(model, execution_device="cpu"),
    "distributed": nn.parallel.DistributedDataParallel,
    "fully sharded": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))),
}


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


@pytest.mark.parametrize("name", WRAPPERS)
def test_an_expert_set_reaches_a_wrapped_model(export: Path, name: str, one_process_group: None) -> None:
    torch.compiler.reset()
    plain, wrapped = load(export), WRAPPERS[name](load(export))
    assert torch.equal(logits(wrapped), unmasked := logits(plain))
    experts = ExpertSet.choose(wrapped, 0, [(None, 5), (3, None)], layers=[1])
    experts = experts.union(ExpertSet.choose(wrapped, 1, [(i, None) for i in range(32)], 2.0))
    if name not in ("offloaded", "fully sharded"):  # whose weights are elsewhere
        assert identify(wrapped) == identify(plain)
    for model in (plain, wrapped):
        experts.apply(model)
    assert torch.equal(logits(wrapped), logits(plain))
    assert deviation(logits(plain), unmasked) > 0.1
    ExpertSet(identify(plain), {}).apply(wrapped)
    assert torch.equal(logits(wrapped), unmasked)


def test_an_expert_set_applies_to_a_model_without_its_head(export: Path) -> None:
    model = AutoModel.from_pretrained(export, trust_remote_code=True)
    experts = ExpertSet.choose(load(export), 0, [(None, 5)])
    with torch.no_grad():
        before = model(IDS).last_hidden_state
        experts.apply(model)
        assert deviation(model(IDS).last_hidden_state, before) > 0.01


def test_what_holds_no_monet_is_refused_in_one_line(export: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Linear holds no Monet: give a model of load_pretrained") as refused:
        ExpertSet.choose(load(export), 0, [(1, 2)]).apply(nn.Linear(2, 2))
    assert "\n" not in str(refused.value)
    for model in (load(export), lora(load(export), target_modules="all-linear")):
        with pytest.raises(UserError, match=r"saves itself: merge its adapters .* call model\.save_pretrained"):
            save_pretrained(model, tmp_path / "export")
        with pytest.raises(UserError, match=r"one that transformers has loaded has generate\(\)"):
            next(generate_tokens(model, [5, 6], 3, Sampling()))
    own = load_pretrained(export)
    save_pretrained(torch.compile(own, backend="eager"), tmp_path / "export")
    weights = load_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in own.state_dict().items())


@pytest.mark.slow
def test_the_compiled_model_is_one_graph_with_the_same_gradients(export: Path) -> None:
    torch.compiler.reset()
    model = load(export, num_hidden_layers=2).train()  # one routing group
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=IDS, labels=IDS).loss.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert deviation(parameter.grad, gradient) < 1e-6


def test_an_offloaded_model_generates_the_same(export: Path, tmp_path: Path) -> None:
    accelerate = optional("accelerate")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = load(export).generate(IDS, **options)
    model = accelerate.disk_offload(load(export), tmp_path, execution_device="cpu", offload_buffers=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(model.generate(IDS, **options), expected)


def test_adapters_train_on_a_quantized_model(export: Path, tmp_path: Path) -> None:
    peft, transformers = optional("peft"), optional("transformers")
    optional("bitsandbytes")

    def base() -> nn.Module:
        quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
        return peft.prepare_model_for_kbit_training(load(export, quantization_config=quantization, device_map="cpu"))

    torch.manual_seed(0)
    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules="all-linear", r=4))
    train(model, steps=2)
    moved = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    assert sum(".moe." in name for name in moved) in (4 * 6, 4 * 2)
    assert all(parameter.any() for parameter in moved.values())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(), tmp_path)), logits(model))
