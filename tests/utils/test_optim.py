"""Optimizers: the established groups, steps and moments; Muon; several optimizers as one."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from autoregressive.models.gpt import ModelArgs, Transformer
from tests import golden
from tests.processes import in_processes
from utils.distributed import process_group
from utils.ema import update_ema
from utils.optim import Muon, Optimizers, adamw, decay_groups, orthogonalize
from utils.sharded import local, whole

CPU = torch.device("cpu")


@golden.cases("optim.groups")
def test_groups_are_the_established_ones(case):
    model = Transformer(ModelArgs(**case.config["args"]))
    names = {id(p): name for name, p in model.named_parameters()}
    p = case.params
    groups = adamw(decay_groups(model.named_parameters(), p["weight_decay"]), p["lr"], (p["beta1"], p["beta2"]), CPU)
    got = [
        {**{k: group[k] for k in ("weight_decay", "lr", "eps")}, "betas": list(group["betas"]),
         "params": [names[id(param)] for param in group["params"]], "numel": sum(x.numel() for x in group["params"])}
        for group in groups.param_groups
    ]  # fmt: skip
    classes = {"by_dim_class": "AdamW", "by_name_fsdp_class": type(groups).__name__}
    buffers = [name for name, _ in model.named_buffers() if name not in case.expect["buffers"]]
    assert not buffers
    case.check({"by_dim": got, "by_name_fsdp": got, **classes, "buffers": case.expect["buffers"]})


@golden.cases("optim.adamw_steps")
def test_steps_equal_the_established_trainer(case):
    p = case.params
    model = case.fill(Transformer(ModelArgs(**case.config["args"]))).train()
    ema = copy.deepcopy(model)
    groups = decay_groups(model.named_parameters(), p["weight_decay"])
    optimizers = Optimizers(adamw(groups, p["lr"], (p["beta1"], p["beta2"]), CPU))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    outputs, losses, norms = {}, [], []
    for i in range(p["steps"]):
        tokens, cond = case.tensors[f"tokens{i}"], case.tensors[f"cond{i}"]
        _, loss = model(idx=tokens[:, :-1], cond_idx=cond, targets=tokens, valid=case.tensors.get(f"valid{i}"))
        loss.backward()
        losses.append(loss.item())
        norms.append(optimizers.update(scaler, p["max_grad_norm"]).item())
        update_ema(ema, model, **({"decay": p["ema_decay"]} if "ema_decay" in p else {}))
        for key in p["keep"]:
            outputs[f"step{i + 1}.param.{key}"] = model.state_dict()[key].clone()
            outputs[f"step{i + 1}.ema.{key}"] = ema.state_dict()[key].clone()
    parameters = dict(model.named_parameters())
    for key in p["keep_state"]:
        for moment in ("exp_avg", "exp_avg_sq"):
            outputs[f"{moment}.{key}"] = optimizers.members[0].state[parameters[key]][moment]
    case.check({"loss": losses, "grad_norm_before_clip": norms}, skip=tuple(case.outputs))
    for key, want in case.outputs.items():
        entry = case.entry["outputs"][key]
        close = (outputs[key] - want).abs() <= entry["atol"] + entry["rtol"] * want.abs()
        assert close.float().mean() >= 0.999, key  # a gradient near 0 may turn a whole step around


@golden.cases("optim.ema")
def test_ema_equals_the_established_one(case):
    live, average = nn.Module(), nn.Module()
    average.w, live.w = nn.Parameter(case.tensors["w_ema"].clone()), nn.Parameter(case.tensors["w0"].clone())
    average.register_buffer("b", case.tensors["b_ema"].clone())
    live.register_buffer("b", case.tensors["b_live"].clone())
    decay, outputs = case.params["decay"], {}
    for i in range(case.params["steps"]):
        live.w.data.copy_(case.tensors[f"w{i}"])
        update_ema(average, live, **({} if decay is None else {"decay": decay}))
        outputs[f"w_ema_after{i + 1}"] = average.w.detach().clone()
    outputs["b_ema_after"] = average.b
    case.check({**outputs, "decay_used": 0.9999 if decay is None else decay})


def test_ema_names_the_first_difference():
    with pytest.raises(ValueError, match="bias"):
        update_ema(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8), (1, 16, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_agrees_with_torch_on_matrices_and_sees_kernels_as_matrices():
    torch.manual_seed(0)
    start, gradients = torch.randn(12, 18), [torch.randn(12, 18) for _ in range(3)]
    ours = nn.Parameter(start.clone().view(12, 2, 3, 3))
    theirs = nn.Parameter(start.clone())
    a = Muon([ours], lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.view(12, 2, 3, 3).clone(), gradient.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours.detach().view(12, 18), theirs.detach(), atol=4e-3, rtol=0)  # theirs works in bf16
    assert (ours.detach().view(12, 18) - start).abs().max() > 0.02


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="two or more dimensions"):
        Muon([nn.Parameter(torch.zeros(3))])


SHAPES = [*[(5, 4)] * 9, (1, 6), (4, 6)]  # more of one shape than are gathered together; shards of unequal size


def steps_of_muon(sharded):
    """Whole weights and shapes of the local momenta, after two steps with gradients from fixed seeds."""
    generator = torch.Generator().manual_seed(0)
    with process_group("cpu"):
        mesh = init_device_mesh("cpu", (2,)) if sharded else None

        def placed():
            values = [torch.randn(shape, generator=generator) for shape in SHAPES]
            return [distribute_tensor(value, mesh, [Shard(0)]) for value in values] if sharded else values

        weights = [nn.Parameter(value) for value in placed()]
        muon = Muon(weights, lr=0.1, weight_decay=0.1)
        for _ in range(2):
            for p, gradient in zip(weights, placed()):
                p.grad = gradient
            muon.step()
        shapes = [tuple(local(muon.state[p]["momentum_buffer"]).shape) for p in weights]
        return [whole(p.detach()).tolist() for p in weights], shapes


def test_muon_of_shards_is_muon_of_whole_matrices():
    (expected, _), (first, shapes), (second, others) = [
        *in_processes(1, steps_of_muon, False), *in_processes(2, steps_of_muon, True)
    ]  # fmt: skip
    assert shapes == [*[(3, 4)] * 9, (1, 6), (2, 6)] and others == [*[(2, 4)] * 9, (0, 6), (2, 6)]
    for found in (first, second):
        for value, right in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(value), torch.tensor(right), atol=1e-5, rtol=1e-5)


def test_the_parameter_of_a_state_is_found_by_its_path():
    layer, two = two_optimizers()
    assert two.parameter_at(("members", "0", "state", "0", "momentum_buffer")) is layer.weight
    assert two.parameter_at(("members", "1", "state", "0", "exp_avg")) is layer.bias
    assert two.parameter_at(("members", "1", "state", "1", "exp_avg")) is None
    assert two.parameter_at(("members", "2", "state", "0", "exp_avg")) is None
    one = Optimizers(adamw([{"params": list(layer.parameters())}], 0.1, (0.9, 0.95), CPU))
    assert one.parameter_at(("state", "1", "exp_avg")) is layer.bias


def two_optimizers(lr: float = 0.1) -> tuple[nn.Linear, Optimizers]:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    return layer, Optimizers(Muon([layer.weight], lr), adamw([{"params": [layer.bias]}], lr, (0.9, 0.95), CPU))


def test_optimizers_resume_moments_but_keep_this_runs_learning_rate():
    layer, first = two_optimizers(lr=0.1)
    layer(torch.ones(1, 4)).sum().backward()
    first.update(torch.amp.GradScaler("cpu", enabled=False), 0.0)
    other, second = two_optimizers(lr=0.3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.set_lr_factor(0.5)
    assert [group["lr"] for member in second.members for group in member.param_groups] == [0.15, 0.15]
    torch.testing.assert_close(
        second.members[0].state[other.weight]["momentum_buffer"],
        first.members[0].state[layer.weight]["momentum_buffer"],
    )


def test_optimizers_refuse_the_state_of_other_optimizers():
    _, two = two_optimizers()
    layer = nn.Linear(4, 4)
    one = Optimizers(adamw(decay_groups(layer.named_parameters(), 0.0), 0.1, (0.9, 0.95), CPU))
    with pytest.raises(ValueError, match="--optimizer"):
        one.load_state_dict(two.state_dict())


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_gradient_that_overflows_in_one_optimizer_keeps_the_others_from_stepping(max_norm):
    layer, optimizers = two_optimizers()
    scaler, before = torch.amp.GradScaler("cpu", init_scale=4.0), copy.deepcopy(layer.state_dict())
    scaler.scale(layer(torch.ones(1, 4)).sum()).backward()
    layer.bias.grad[1] = float("inf")
    optimizers.update(scaler, max_norm)
    assert scaler.get_scale() == 2.0 and layer.weight.grad is None
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    scaler.scale(layer(torch.ones(1, 4)).sum()).backward()
    optimizers.update(scaler, max_norm)
    assert not torch.equal(layer.weight, before["weight"]) and layer.weight.isfinite().all()


def steps(update, max_norm: float, count: int = 4) -> tuple[nn.Linear, Optimizers]:
    """A layer and its optimizer after `count` steps with gradients of norms around one."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    optimizers = Optimizers(adamw(decay_groups(layer.named_parameters(), 0.1), 0.01, (0.9, 0.95), CPU))
    for number in range(count):
        layer(torch.randn(5, 6)).square().sum().backward()
        for p in layer.parameters():
            p.grad.mul_(0.05 * (1 + number))
        update(optimizers, max_norm)
    return layer, optimizers


def assert_same_state(one, other, **tolerance):
    torch.testing.assert_close(dict(one[0].state_dict()), dict(other[0].state_dict()), **tolerance)
    torch.testing.assert_close(one[1].state_dict()["state"], other[1].state_dict()["state"], **tolerance)


@pytest.mark.parametrize("max_norm", [0.0, 0.8])
def test_clipping_inside_the_fused_step_is_clipping(max_norm):
    norms = {"apart": [], "inside": []}
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def inside(optimizers, max_norm):
        norm = optimizers.norm()
        optimizers.step_scaled(norm, max_norm, torch.zeros(()))
        norms["inside"].append(norm.item())

    apart = steps(lambda optimizers, limit: norms["apart"].append(optimizers.update(scaler, limit).item()), max_norm)
    exact = {"rtol": 0, "atol": 0} if not max_norm else {"rtol": 1e-4, "atol": 1e-7}
    assert_same_state(apart, steps(inside, max_norm), **exact)
    assert norms["inside"] == norms["apart"] and min(norms["inside"]) < 0.8 < max(norms["inside"])
    assert all(p.grad is None for p in apart[0].parameters())


def test_a_refused_step_changes_neither_weights_nor_moments_nor_counts():
    def refused_third(optimizers, max_norm):
        third = any(state["step"] == 2 for state in optimizers.members[0].state.values())
        gradient = optimizers.parameters[0].grad
        if third:
            gradient.fill_(float("nan"))
        optimizers.step_scaled(optimizers.norm(), max_norm, torch.tensor(float(third)))
        assert all(p.grad is None for p in optimizers.parameters)

    two, three = steps(refused_third, 0.8, count=2), steps(refused_third, 0.8, count=3)
    assert_same_state(two, three, rtol=0, atol=0)
    assert three[1].members[0].state[three[0].weight]["step"] == 2


def test_fused_is_adamw_alone():
    assert not two_optimizers()[1].fused
    assert steps(lambda *_: None, 0.0)[1].fused


def test_a_refused_step_leaves_the_averages_alone():
    torch.manual_seed(0)
    live, average = nn.Linear(4, 4), nn.Linear(4, 4)
    start = copy.deepcopy(average)
    update_ema(average, live, 0.9, refused=torch.ones(()))
    assert torch.equal(average.weight, start.weight) and torch.equal(average.bias, start.bias)
    update_ema(average, live, 0.9, refused=torch.zeros(()))
    update_ema(start, live, 0.9)
    torch.testing.assert_close(average.weight, start.weight, rtol=1e-6, atol=1e-7)
    assert not torch.equal(average.weight, live.weight)
