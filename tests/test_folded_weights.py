"""No change of a weight goes unseen: evaluation mode folds anew, an older fold refuses, a copy stays what it is."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from evc_fast.model import FaceNetConfig, FaceNetEncoder
from evc_fast.ops import dispatch
from evc_fast.testing.encoder_cases import ENCODER_OPTIONS, build_encoder, cast_inputs, encoder_inputs, named_outputs

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_CPP = dispatch.implementations(dispatch.OPS[0])[0].available
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="built with EVC_FAST_NO_EXTENSION=1: nothing folds by itself")


def made(dtype: torch.dtype = torch.float32, **options) -> tuple[FaceNetEncoder, list[Tensor | None]]:
    encoder = build_encoder(**options).to(dtype)
    return encoder, encoder_inputs(encoder.config, dtype=dtype)


class Ops(TorchDispatchMode):
    """Which ops a call runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def ran_folded(encoder: FaceNetEncoder, call: Callable[[], object]) -> bool:
    """Whether a call ran on the fold: then no submodule of the encoder's computes anything."""
    with torch.autograd.profiler.profile() as profile:
        call()
    return "evc_fast::folded_encoder_forward" in {event.name for event in profile.function_events}


def assert_current(encoder: FaceNetEncoder, arguments: list[Tensor | None], what: str = "") -> None:
    """Evaluation without gradients gives what the straight encoder gives, explanation included."""
    with torch.no_grad():
        got = named_outputs(encoder(*arguments, explain=True))
        want = named_outputs(encoder(*arguments, explain=True, impl="reference"))
    for name, expected in want.items():
        if expected is not None:
            wide = got["tokens"].dtype != torch.bfloat16
            tolerance = {"rtol": 1e-4, "atol": 2e-5} if wide else {"rtol": 0.1, "atol": 0.1}
            torch.testing.assert_close(got[name], expected, msg=lambda m, n=name: f"{what} {n}: {m}", **tolerance)


# --- Evaluation mode folds by itself ----------------------------------------------------------------


@needs_cpp
@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_folds_by_itself(mode, options):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        encoder, arguments = made(dtype, **options)
        with mode():
            got = encoder(*arguments, explain=True)
            want = encoder.fold()(*arguments, explain=True)
            assert ran_folded(encoder, lambda e=encoder, a=arguments: e(*a))
        for x, y in zip(named_outputs(got).values(), named_outputs(want).values(), strict=True):
            assert x is y is None or torch.equal(x, y)
            assert x is None or not x.requires_grad


@needs_cpp
def test_where_the_encoder_itself_runs():
    encoder, arguments = made()
    graded = [arguments[0].clone().requires_grad_(), *arguments[1:]]
    longer = encoder_inputs(FaceNetConfig.from_dict(encoder.config.to_dict() | {"num_frames": 9}), dtype=torch.float32)
    assert not ran_folded(encoder, lambda: encoder(*arguments)), "parameters ask for gradients"
    with torch.no_grad():
        assert ran_folded(encoder, lambda: encoder(*graded))
        assert not ran_folded(encoder, lambda: encoder(*longer)), "another number of frames"
        assert not ran_folded(encoder, lambda: encoder(*arguments, impl="reference"))
        assert not ran_folded(encoder, lambda: encoder(*arguments, impl="cpp"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not ran_folded(encoder, lambda: encoder(*arguments))
        with Ops() as ops:
            encoder(*arguments)
        assert "evc_fast::folded_encoder_forward" not in ops.names
        encoder.train()
        assert not ran_folded(encoder, lambda: encoder(*arguments))
        encoder.eval()
        assert ran_folded(encoder, lambda: encoder(*arguments))
    encoder.requires_grad_(False)
    assert ran_folded(encoder, lambda: encoder(*arguments)), "nothing asks for gradients"
    assert not ran_folded(encoder, lambda: encoder(*graded))
    encoder(*graded).tokens.sum().backward()
    assert graded[0].grad.abs().sum() > 0
    encoder.half()
    with torch.no_grad():
        assert not ran_folded(encoder, lambda: encoder(*cast_inputs(arguments, torch.float16)))


def test_gradients_stay_those_of_the_encoder():
    encoder, arguments = made(torch.float64)
    with torch.no_grad():
        encoder(*arguments)
    for impl in (None, "reference"):
        encoder.zero_grad()
        encoder(*arguments, impl=impl).tokens.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
        if impl is None:
            first = gradients
    assert gradients.keys() == first.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(first[name], gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_forward_hooks_run(register):
    encoder, arguments = made()
    with torch.no_grad():
        encoder(*arguments)
        for name in ("phi_f", "fact_norm", "qformer.cross_attention", "qformer.output_projection", "ffn.0"):
            seen = []
            handle = getattr(encoder.get_submodule(name), register)(lambda *a, seen=seen: seen.append(1))
            if name == "phi_f":  # on the submodules that every plan of the products calls
                handle.remove()
                continue
            encoder(*arguments, impl="reference")
            expected = len(seen)
            encoder(*arguments)
            assert expected > 0
            handle.remove()
        changed = encoder.emotion_head.register_forward_hook(lambda m, i, out: out + 1)
        torch.testing.assert_close(
            encoder(*arguments).emotion_logits, encoder(*arguments, impl="reference").emotion_logits
        )
        changed.remove()
    assert_current(encoder, arguments)


def test_a_hook_on_the_encoder_itself_runs_once():
    encoder, arguments = made()
    seen = []
    encoder.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        encoder(*arguments)
    assert len(seen) == 1


def use_relu(e: FaceNetEncoder) -> None:
    e.ffn[1] = nn.ReLU()


def change_eps(e: FaceNetEncoder) -> None:
    e.fact_norm.eps = 0.5


def change_config(e: FaceNetEncoder) -> None:
    e.config = dataclasses.replace(e.config, self_refine=not e.config.self_refine)


def patch_forward(e: FaceNetEncoder) -> None:
    forward = e.emotion_head.forward
    e.emotion_head.forward = lambda x: forward(x) * 2


def use_tanh_gelu(e: FaceNetEncoder) -> None:
    e.ffn[1].approximate = "tanh"


def append_tanh(e: FaceNetEncoder) -> None:
    e.ffn[3] = nn.Sequential(e.ffn[3], nn.Tanh())


def prune_half(e: FaceNetEncoder) -> None:
    prune.l1_unstructured(e.ffn[3], "weight", amount=0.5)


def normalize_weight(e: FaceNetEncoder) -> None:
    nn.utils.parametrizations.weight_norm(e.ffn[3])
    with torch.no_grad():
        e.ffn[3].parametrizations.weight.original0.mul_(3)


OTHER_MODULES = [use_relu, change_eps, change_config, use_tanh_gelu, patch_forward, append_tanh, prune_half]
OTHER_MODULES += [normalize_weight]


@pytest.mark.parametrize("change", OTHER_MODULES, ids=lambda c: c.__name__)
def test_a_submodule_that_computes_something_else_is_heeded(change):
    for called_before in (True, False):
        encoder, arguments = made()
        if called_before:
            assert_current(encoder, arguments)
        change(encoder)
        assert_current(encoder, arguments)


@pytest.mark.parametrize("change", [use_relu, patch_forward, append_tanh, normalize_weight], ids=lambda c: c.__name__)
def test_a_submodule_that_computes_something_else_cannot_be_folded(change):
    encoder, _ = made()
    change(encoder)
    with pytest.raises(RuntimeError, match=r"fold\(\) cannot fold this encoder: its "):
        encoder.eval().fold()


def test_a_subclass_runs_itself():
    class Louder(FaceNetEncoder):
        def project_emotions(self, context: Tensor) -> Tensor:
            return 3 * super().project_emotions(context)

    encoder, arguments = made()
    louder = Louder(encoder.config).eval()
    louder.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        for _ in range(2):
            got, want = louder(*arguments, impl=None), louder(*arguments, impl="cpp" if HAS_CPP else None)
            assert torch.equal(got.tokens, want.tokens)
    with pytest.raises(RuntimeError, match="cannot fold this encoder: it is a Louder"):
        louder.fold()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_function_transforms_reach_the_encoder_itself():
    encoder, arguments = made()
    present = tuple(x for x in arguments if x is not None)
    encoder(*arguments)
    several = [torch.stack([x, x + 0.1]) for x in present]
    got = torch.func.vmap(lambda *x: encoder(*x).tokens)(*several)
    torch.testing.assert_close(got[1], encoder(*(x[1] for x in several)).tokens, rtol=1e-4, atol=2e-5)
    weights = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in encoder.named_parameters()}
    got = torch.func.vmap(lambda w: torch.func.functional_call(encoder, w, present).tokens)(weights)
    torch.testing.assert_close(got[0], encoder(*arguments).tokens, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_forward_derivatives_are_refused_and_never_dropped():
    encoder, arguments = made()
    encoder(*arguments)
    with forward_ad.dual_level():
        video = forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0]))
        with pytest.raises(RuntimeError):  # PyTorch's own words: the ops' autograd has no forward derivatives
            encoder(video, *arguments[1:])


def test_dropout_left_in_training_mode_acts():
    encoder, arguments = made()
    encoder.ffn[2].train()
    with torch.no_grad():
        assert not torch.equal(encoder(*arguments).tokens, encoder(*arguments).tokens)


# --- Changes of the weights -------------------------------------------------------------------------


def load(e: FaceNetEncoder) -> None:
    e.load_state_dict(build_encoder(seed=5).float().state_dict())


def load_by_assignment(e: FaceNetEncoder) -> None:
    e.load_state_dict(build_encoder(seed=5).float().state_dict(), assign=True)


def optimizer_step(e: FaceNetEncoder) -> None:
    for p in e.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.Adam(e.parameters(), lr=0.1).step()


def fused_optimizer_step(e: FaceNetEncoder) -> None:
    for p in e.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(e.parameters(), lr=0.1, fused=True).step()


def foreach(e: FaceNetEncoder) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(e.parameters()), 0.9)


def in_place(e: FaceNetEncoder) -> None:
    with torch.no_grad():
        e.phi_v.weight[2, 3] += 1


def in_place_in_inference_mode(e: FaceNetEncoder) -> None:
    with torch.inference_mode():
        e.phi_v.weight.mul_(2)


def data_mul(e: FaceNetEncoder) -> None:
    e.ffn[0].weight.data.mul_(1.5)


def data_assigned(e: FaceNetEncoder) -> None:
    e.qformer.queries.data = e.qformer.queries.data * 2


def data_transposed(e: FaceNetEncoder) -> None:
    e.phi_f.weight.data = e.phi_f.weight.data.t()


def numpy_write(e: FaceNetEncoder) -> None:
    e.qformer.output_projection.weight.detach().numpy()[:] *= -1


def new_parameter(e: FaceNetEncoder) -> None:
    e.fact_gate.bias = nn.Parameter(e.fact_gate.bias.detach() + 1)


def new_submodule(e: FaceNetEncoder) -> None:
    torch.manual_seed(3)
    e.emotion_head = nn.Linear(16, 7)


def new_nested_submodule(e: FaceNetEncoder) -> None:
    torch.manual_seed(3)
    e.qformer.cross_attention.v_proj = nn.Linear(16, 16)


def new_words(e: FaceNetEncoder) -> None:
    e.emotion_features = torch.flip(e.emotion_features, [0]) + 1


def words_written(e: FaceNetEncoder) -> None:
    e.emotion_features.copy_(e.emotion_features * 3)


def vector_to_parameters(e: FaceNetEncoder) -> None:
    with torch.no_grad():
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(e.parameters()) * 0.5, e.parameters())


CHANGES = [
    load,
    load_by_assignment,
    optimizer_step,
    fused_optimizer_step,
    foreach,
    in_place,
    in_place_in_inference_mode,
    data_mul,
    data_assigned,
    data_transposed,
    numpy_write,
    new_parameter,
    new_submodule,
    new_nested_submodule,
    new_words,
    words_written,
    vector_to_parameters,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_change_is_taken_up_by_evaluation_and_refused_by_a_fold(change):
    encoder, arguments = made()
    folded = encoder.fold()
    kept, alone = copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))
    with torch.no_grad():
        before = encoder(*arguments, impl="reference").tokens
    assert_current(encoder, arguments)
    change(encoder)
    encoder.eval()
    with torch.no_grad():
        changed = encoder(*arguments, impl="reference")
        matters = not torch.allclose(changed.tokens, before, rtol=1e-4, atol=1e-4)
        assert matters or change is new_submodule, "the head of the emotion logits alone does not reach the tokens"
    for impl in (None, "reference"):
        with (
            torch.no_grad(),
            pytest.raises(
                RuntimeError, match=r"the encoder has changed since it was folded: call encoder.fold\(\) again"
            ),
        ):
            folded(*arguments, impl=impl)
    assert_current(encoder, arguments, "after the change")
    assert_current(encoder, arguments, "and again")
    with torch.no_grad():
        torch.testing.assert_close(encoder.fold()(*arguments).tokens, changed.tokens, rtol=1e-4, atol=2e-5)
        for snapshot in (kept, alone):
            torch.testing.assert_close(snapshot(*arguments).tokens, before, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("change", [change_eps, change_config, use_tanh_gelu, use_relu], ids=lambda c: c.__name__)
def test_a_fold_refuses_when_its_encoder_computes_something_else(change):
    encoder, arguments = made()
    folded = encoder.fold()
    change(encoder)
    with pytest.raises(RuntimeError, match="the encoder has changed since it was folded"):
        folded(*arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_type_is_taken_up(dtype):
    encoder, arguments = made()
    folded = encoder.fold()
    assert_current(encoder, arguments)
    encoder.to(dtype)
    assert_current(encoder, cast_inputs(arguments, dtype))
    with pytest.raises(RuntimeError, match="the encoder has changed since it was folded"):
        folded(*arguments)
    encoder.to(torch.float32)
    assert_current(encoder, arguments)


def test_training_between_evaluations():
    encoder, arguments = made()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05)
    for _ in range(4):
        encoder.train()
        optimizer.zero_grad()
        encoder(*arguments).tokens.square().mean().backward()
        optimizer.step()
        encoder.eval()
        assert_current(encoder, arguments)


def test_functional_call_takes_the_tensors_it_is_given():
    encoder, arguments = made()
    present = tuple(x for x in arguments if x is not None)
    assert_current(encoder, arguments)
    folded = encoder.fold()
    with torch.no_grad():
        own = encoder(*arguments).tokens
        for scale in (1.5, 2.0):
            other = {name: p.detach() * scale for name, p in encoder.named_parameters()}
            got, want = (
                torch.func.functional_call(encoder, other, present, {"impl": impl}).tokens
                for impl in (None, "reference")
            )
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
        assert torch.equal(encoder(*arguments).tokens, own)
        assert torch.equal(folded(*arguments).tokens, own), "the encoder is as it was"
