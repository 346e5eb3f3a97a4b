"""The encoder with its weights folded for inference: the same function, (10)-(29), with less than half the products."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from evc_fast import ops
from evc_fast.model.attention import MultiHeadAttention
from evc_fast.model.folded_graph import GraphedCall
from evc_fast.model.inputs import check_inputs
from evc_fast.model.output import EncoderOutput, Explanation
from evc_fast.model.stamp import Stamp
from evc_fast.ops import _cuda, dispatch
from evc_fast.ops._contract import without_autocast
from evc_fast.ops._library import EXTENSION_MISSING
from evc_fast.ops.dispatch import CPP_DTYPES, FLOATING_DTYPES, GPU_DTYPES, Impl
from evc_fast.ops.folded_cuda import pack_folded_encoder_cuda
from evc_fast.ops.folded_encoder import align_folded_encoder, folded_sizes
from evc_fast.reference.folded_encoder import FoldedOptions, FoldedOutput, FoldedWeights

if TYPE_CHECKING:
    from evc_fast.model.config import FaceNetConfig
    from evc_fast.model.encoder import FaceNetEncoder

# Videos up to which one kernel for the whole encoder is expected to beat the library's products under a CUDA graph.
# Predicted, not measured: with this many videos, the products of a stage fill the tensor cores of a large GPU.
_KERNEL_VIDEOS = 8


class FoldedEncoder(nn.Module):
    """What :meth:`FaceNetEncoder.fold` gives: a snapshot for inference, called as the encoder is.

    Its buffers are products of the encoder's weights (:class:`~evc_fast.reference.folded_encoder.FoldedWeights`).
    A compiled or exported graph of it holds the plain PyTorch form, and no longer asks whether the encoder has changed.
    On a GPU, few videos run in one kernel, many as the library's products and Triton's fused ops in a CUDA graph,
    captured when a size comes again.

    Args:
        weights: made by :func:`fold_weights`.
        config: the encoder's configuration.
        num_frames: N, the number of frames that every call must have.
        norm_eps: of the encoder's LayerNorm.

    Attributes:
        config, num_frames: as given. dtype: of the weights, and of tokens, logits and gates.
    """

    def __init__(self, weights: FoldedWeights, config: FaceNetConfig, num_frames: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.config = config
        self.num_frames = num_frames
        self.options = folded_options(config, norm_eps)
        for name, weight in weights._asdict().items():
            self.register_buffer(name, weight)
        # The buffers' state; "cpp" or "cuda", for which they are packed, or ""; what the kernel reads.
        self._packed: tuple[Stamp, str, list[Tensor]] | None = None
        self._graphs: dict[bool, GraphedCall] = {}  # by `explain`
        self._kernel_videos = 0  # up to how many the one kernel serves on a GPU
        self._source: weakref.ref | None = None  # the encoder, which remembers how it was
        self._pack()
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, of tokens, logits and gates."""
        return self.ffn_weight.dtype

    def train(self, mode: bool = True) -> FoldedEncoder:
        """Evaluation mode only.

        Raises:
            RuntimeError: ``mode`` is True.
        """
        if mode:
            raise RuntimeError("a folded encoder cannot be trained: train the encoder that it was folded from")
        return super().train(False)

    def forward(
        self,
        video: Tensor,
        triplets: Tensor | None = None,
        similarity: Tensor | None = None,
        groups: Tensor | None = None,
        *,
        explain: bool = False,
        impl: Impl | None = None,
    ) -> EncoderOutput:
        """Encode a batch; arguments and result as of :meth:`FaceNetEncoder.forward`.

        Features of bfloat16 and float16 modules may be float32 too.

        Args:
            impl: "reference" is plain PyTorch, differentiable in the features; without gradients "cpp", and "cuda" on a
                GPU, is one compiled call, and "triton" the library's products and the fused ops; None takes what is
                fastest where it serves and no gradient is asked for.

        Raises:
            TypeError, ValueError: an argument is missing, superfluous, or of the wrong type, shape or device;
                the number of frames or of triplets is not the folded one.
            RuntimeError: ``impl`` cannot run here, or the encoder's weights have changed since they were folded.
        """
        self._check_inputs(video, triplets, similarity, groups)
        if not torch.compiler.is_compiling():
            self._check_source()
            packed = self._packed
            if packed is not None and not packed[0].matches():
                self._pack()
        return self.run(video, triplets, similarity, groups, explain=explain, impl=impl)

    def run(
        self,
        video: Tensor,
        triplets: Tensor | None,
        similarity: Tensor | None,
        groups: Tensor | None,
        *,
        explain: bool,
        impl: Impl | None = None,
    ) -> EncoderOutput:
        """:meth:`forward` where inputs and weights are known to be as they should."""
        inputs = video, triplets, similarity, groups
        if impl is None and torch.compiler.is_compiling():
            impl = "reference"  # its weights are inputs of the graph, or its constants: packed ones would be neither
        if impl is None and self._graphs and len(video) > self._kernel_videos and not _asks_gradient(inputs):
            output = self._graphs[explain](*inputs)
        else:
            packed = self._packed
            output = ops.folded_encoder(
                *inputs,
                self._weights(),
                self.options,
                packed=packed[2] if packed and impl in (None, packed[1]) and packed[1] else None,
                explain=explain,
                impl=impl,
            )
        return EncoderOutput(*output[:2], Explanation(*output[2:]) if explain else None)

    def _by_products(self, aligned: list[Tensor], explain: bool, *inputs: Tensor | None) -> FoldedOutput:
        """The library's products, and between them the fused ops."""
        weights = self._weights()
        with without_autocast(self.ffn_weight):
            return ops.folded_encoder(*inputs, weights, self.options, packed=aligned, explain=explain, impl="triton")

    def _weights(self) -> FoldedWeights:
        return FoldedWeights(*map(self._buffers.__getitem__, FoldedWeights._fields))

    def _pack(self) -> None:
        """Pack the buffers for this machine, where the compiled kernels take them; other threads may be calling."""
        stamp = Stamp(self)
        packed: tuple[str, list[Tensor]] = "", []
        if _compiled_serves(self.ffn_weight):
            packed = "cpp", ops.pack_folded_encoder(self._weights(), self.options)
        elif _kernel_serves(self.ffn_weight):
            packed = "cuda", pack_folded_encoder_cuda(self._weights(), self.options)
        self._packed = stamp, *packed
        self._kernel_videos = _KERNEL_VIDEOS if packed[0] == "cuda" and not self._kernel_obstacle() else 0
        self._graphs = {}
        if _triton_serves(self.ffn_weight):
            aligned = align_folded_encoder(self._weights(), self.options)
            self._graphs = {e: GraphedCall(functools.partial(self._by_products, aligned, e)) for e in (False, True)}

    def _kernel_obstacle(self) -> str:
        """Why no multiprocessor holds a video of these sizes (thousands of queries), or ""."""
        return _cuda.folded_obstacle(folded_sizes(self._weights(), self.options), self.num_frames, self.ffn_weight)

    def _check_source(self) -> None:
        encoder = self._source() if self._source is not None else None
        if encoder is not None and not encoder.self_folding.unchanged(encoder, self):
            raise RuntimeError("the encoder has changed since it was folded: call encoder.fold() again")

    def _apply(self, fn, recurse=True):
        self._packed = None
        super()._apply(fn, recurse)
        self._pack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy is on its own: it stays what it is, whatever happens to the encoder.
        return self.__dict__ | {"_packed": None, "_graphs": {}, "_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def _check_inputs(
        self, video: Tensor, triplets: Tensor | None, similarity: Tensor | None, groups: Tensor | None
    ) -> None:
        check_inputs(self.config, self.ffn_weight, video, triplets, similarity, groups, widen=True)
        if video.shape[1] != self.num_frames:
            raise ValueError(
                f"video must have the {self.num_frames} frames that the encoder was folded for, got shape "
                f"{list(video.shape)}: fold(num_frames={video.shape[1]}) takes them"
            )


def fold(encoder: FaceNetEncoder, dtype: torch.dtype | None, num_frames: int | None) -> FoldedEncoder:
    """:meth:`FaceNetEncoder.fold`, which states the contract."""
    weight = encoder.fact_norm.weight
    if encoder.training:
        raise RuntimeError("fold() needs an encoder in evaluation mode: call eval() first")
    dtype = weight.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATING_DTYPES:
        raise TypeError(f"fold: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if dtype not in CPP_DTYPES and weight.device.type == "cpu":
        raise TypeError(f"fold: {dtype} has no kernel on the CPU, float32, bfloat16 and float64 have")
    num_frames = encoder.config.num_frames if num_frames is None else num_frames
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"fold: num_frames must be an integer of at least 1, got {num_frames!r}")
    obstacle = _obstacle(encoder)
    if obstacle:
        raise RuntimeError(f"fold() cannot fold this encoder: {obstacle}")
    state = _State(encoder)
    folded = FoldedEncoder(fold_weights(encoder, dtype), encoder.config, num_frames, encoder.fact_norm.eps)
    folded._source = weakref.ref(encoder)
    encoder.self_folding.watch(folded, state)
    return folded


class SelfFolding:
    """What an encoder keeps for evaluation mode: its own fold, made anew whenever a weight has changed.

    A copy of the encoder starts with none.
    """

    def __init__(self) -> None:
        # The encoder's state and the fold made of it, None where it cannot be folded; replaced as a whole, since other
        # threads may be calling.
        self._current: tuple[_State, FoldedEncoder | None] | None = None
        self._watched: weakref.WeakKeyDictionary[FoldedEncoder, _State] = weakref.WeakKeyDictionary()

    def watch(self, folded: FoldedEncoder, state: _State) -> None:
        """Remember that ``folded`` was made of the encoder in this state."""
        self._watched[folded] = state

    def unchanged(self, encoder: FaceNetEncoder, folded: FoldedEncoder) -> bool:
        """Whether the encoder is as it was when ``folded`` was made of it."""
        state = self._watched[folded]
        return state.matches(encoder) and not state.disturbed()

    def get(self, encoder: FaceNetEncoder, inputs: Sequence[Tensor | None]) -> FoldedEncoder | None:
        """The fold that serves these inputs, or None where the encoder itself must run.

        That is: off the CPU or without the compiled library; where derivatives are asked for; under autocast,
        compiling, tracing, function transforms or a dispatch mode; with another number of frames than the
        configuration's; and where a submodule is not what the encoder was built with, or has a forward hook.
        """
        weight = encoder.fact_norm.weight
        if (
            weight is None
            or not _compiled_serves(weight)
            or inputs[0].shape[1] != encoder.config.num_frames
            or inputs[0].dtype != weight.dtype
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or is_in_torch_dispatch_mode()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or any(x is not None and type(x) is not Tensor for x in inputs)
            or (torch.is_grad_enabled() and _wants_gradient(encoder, inputs))
        ):
            return None
        current = self._current
        if current is None or not current[0].matches(encoder):
            state = _State(encoder)  # read first: what changes while the fold is made does not match it
            folded = None
            if not _obstacle(encoder):
                weights = fold_weights(encoder, weight.dtype)
                folded = FoldedEncoder(weights, encoder.config, encoder.config.num_frames, encoder.fact_norm.eps)
            self._current = current = state, folded
        return None if current[0].disturbed() else current[1]

    def __deepcopy__(self, memo: dict) -> SelfFolding:
        return SelfFolding()

    def __reduce__(self) -> tuple:
        return SelfFolding, ()


class _State:
    """An encoder at one moment: its weights, and the settings that a fold takes over."""

    def __init__(self, encoder: FaceNetEncoder) -> None:
        self._stamp = Stamp(encoder)
        self._attentions = [m for m in self._stamp.modules if isinstance(m, MultiHeadAttention)]
        self._settings = self._read(encoder)

    def matches(self, encoder: FaceNetEncoder) -> bool:
        """Whether weights and settings are as they were."""
        return self._stamp.matches() and self._read(encoder) == self._settings

    def disturbed(self) -> bool:
        """Whether a module trains, has a forward of its own, or a hook that only its own forward runs."""
        return any(map(_disturbance, self._stamp.modules))

    def _read(self, encoder: FaceNetEncoder) -> tuple:
        norm, activation = vars(encoder.fact_norm).get("eps"), vars(encoder.ffn[1]).get("approximate")
        return encoder.config, norm, activation, [attention.num_heads for attention in self._attentions]


def _disturbance(module: nn.Module) -> str:
    """What makes this module do more than its weights and its type say, or ""."""
    if module.training:
        return "is in training mode"
    if "forward" in vars(module):
        return "has a forward of its own"
    return "has a forward hook" if module._forward_hooks or module._forward_pre_hooks else ""


def _obstacle(encoder: FaceNetEncoder) -> str:
    """Why a fold would compute another function than the encoder does, or ""."""
    built = _built_types(type(encoder), encoder.config)
    for name, module in encoder.named_modules():
        where = f"its {name}" if name else "it"
        if type(module) is not built.get(name):
            return f"{where} is a {type(module).__name__}, and was not built as one"
        if _disturbance(module):
            return f"{where} {_disturbance(module)}"
    if encoder.ffn[1].approximate != "none" or not encoder.fact_norm.elementwise_affine:
        return "its GELU or its LayerNorm has another form than the one it was built with"
    return ""


@functools.lru_cache(maxsize=32)
def _built_types(kind: type, config: FaceNetConfig) -> dict[str, type]:
    """Name and type of every module of the encoder that this configuration builds; of a subclass none is known."""
    from evc_fast.model.encoder import FaceNetEncoder

    if kind is not FaceNetEncoder:
        return {}
    with torch.device("meta"):
        return {name: type(module) for name, module in FaceNetEncoder(config).named_modules()}


def _wants_gradient(encoder: FaceNetEncoder, inputs: Sequence[Tensor | None]) -> bool:
    tensors = (*encoder.parameters(), *(x for x in inputs if x is not None))
    return any(t.requires_grad for t in tensors)


def _compiled_serves(weight: Tensor) -> bool:
    return not EXTENSION_MISSING and weight.device.type == "cpu" and weight.dtype in CPP_DTYPES


def _kernel_serves(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype in GPU_DTYPES and not _cuda.missing()


def _triton_serves(weight: Tensor) -> bool:
    (triton,) = (each for each in dispatch.implementations("folded_encoder") if each.name == "triton")
    return weight.is_cuda and not triton.obstacle(weight)


def _asks_gradient(inputs: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def folded_options(config: FaceNetConfig, norm_eps: float = 1e-5) -> FoldedOptions:
    """The configuration, and the LayerNorm's epsilon, as the op takes them."""
    return FoldedOptions(
        num_heads=config.num_heads,
        num_triplets=config.num_triplets,
        num_queries=config.num_queries,
        retrieval=config.retrieval,
        emotion_augmentation=config.emotion_augmentation,
        bias_adjustment=config.bias_adjustment,
        emotion_first=config.order == "emotion_first",
        video_router=config.router == "video",
        merge_identical_triplets=config.merge_identical_triplets,
        self_refine=config.self_refine,
        cross_refine=config.cross_refine,
        norm_eps=norm_eps,
    )


@torch.inference_mode(False)  # tensors made in it would count no changes
@torch.no_grad()
def fold_weights(encoder: FaceNetEncoder, dtype: torch.dtype) -> FoldedWeights:
    """All products of weights that :class:`FoldedWeights` names, made in float64 and rounded once to ``dtype``."""
    options = folded_options(encoder.config)
    e = copy.deepcopy(encoder).double()
    d, heads = e.config.dim, e.config.num_heads
    scale = (d // heads) ** -0.5  # of every attention, moved into its q
    w: dict[str, Tensor | None] = dict.fromkeys(FoldedWeights._fields)
    first, second = e.ffn[0], e.ffn[3]
    w["ffn_weight"], w["ffn_bias"] = second.weight, second.bias
    w["norm_weight"], w["norm_bias"] = e.fact_norm.weight, e.fact_norm.bias
    if isinstance(e.video_projection, nn.Linear):
        w["video_weight"], w["video_bias"] = e.video_projection.weight, e.video_projection.bias

    visual: list[tuple[Tensor, Tensor]] = []  # in the order of visual_sections
    hidden_bias = first.bias
    if options.retrieval:
        attn, of_h = e.fact_attention, first.weight[:, d:]  # W_o and the H half of the FFN's first layer
        constant = attn.o_proj.weight @ attn.v_proj.bias + attn.o_proj.bias  # what every H holds
        hidden_bias = hidden_bias + of_h @ constant
        readers = [of_h]
        if options.has_router:
            blocks = e.router.weight.unflatten(1, (options.num_triplets, d)).transpose(0, 1)  # W_g, [K, K, d]
            readers.append(blocks.flatten(0, 1))
            w["router_bias"] = (blocks @ constant).sum(0)
        by_head = attn.o_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # [heads, d / heads, d]
        w["hidden_weight"] = by_head @ torch.cat(readers).T
        w["triplet_weight"] = torch.cat([attn.k_proj.weight, attn.v_proj.weight]) @ e.triplet_projection.weight
        fact_query = scale * attn.q_proj.weight, scale * attn.q_proj.bias
    visual.append((first.weight[:, :d], hidden_bias))
    if options.retrieval and not options.emotion_first:
        visual.append(fact_query)

    if options.emotion_augmentation:
        attn = e.emotion_attention
        emotion_query = attn.q_proj.weight, attn.q_proj.bias
        if options.emotion_first:
            visual.append(emotion_query)
        else:
            w["emotion_query_weight"], w["emotion_query_bias"] = emotion_query
        # (phi_F F_i) . (phi_V V_j): what does not depend on j drops out of the softmax
        visual.append((e.phi_f.weight.T @ e.phi_v.weight, first.bias.new_zeros(d)))
        visual.append((e.phi_f.bias[None] @ e.phi_v.weight, first.bias.new_zeros(1)))
        w["key"], w["value"] = attn.k_proj(e.emotion_features), attn.v_proj(e.emotion_features)
        weight = e.phi_e.weight @ attn.o_proj.weight
        bias = e.phi_e.weight @ attn.o_proj.bias + e.phi_e.bias
        w["head_weight"] = e.emotion_head.weight @ weight
        w["head_bias"] = e.emotion_head.weight @ bias + e.emotion_head.bias
        if options.bias_adjustment:
            gates = torch.cat([e.fact_gate.weight, e.emotion_gate.weight])
            w["gate_bias"] = torch.cat([e.fact_gate.bias, e.emotion_gate.bias]) + gates[:, d:] @ bias
            w["gate_weight"] = torch.cat([gates[:, :d], gates[:, d:] @ weight], 1)
        if options.emotion_first and options.retrieval:
            bias = torch.cat([bias, fact_query[0] @ bias + fact_query[1]])
            weight = torch.cat([weight, fact_query[0] @ weight])
        w["emotion_weight"], w["emotion_bias"] = weight, bias
    elif options.bias_adjustment:
        w["gate_weight"], w["gate_bias"] = e.fact_gate.weight, e.fact_gate.bias

    queries = (e.qformer.self_attention(e.qformer.queries, e.qformer.queries) + e.qformer.queries)[0]  # (28)
    attn, output = e.qformer.cross_attention, e.qformer.output_projection
    by_head = attn.q_proj(queries).unflatten(1, (heads, -1)).transpose(0, 1)  # [heads, N_q, d / heads]
    scores = scale * by_head @ attn.k_proj.weight.unflatten(0, (heads, -1))
    w["memory_weight"] = torch.cat([scores.flatten(0, 1), attn.v_proj.weight])
    visual.append((w["memory_weight"], w["memory_weight"].new_zeros(len(w["memory_weight"]))))
    w["output_weight"] = output.weight @ attn.o_proj.weight
    w["output_bias"] = output(queries + attn.o_proj.weight @ attn.v_proj.bias + attn.o_proj.bias)  # (29)

    w["visual_weight"], w["visual_bias"] = (torch.cat(parts) for parts in zip(*visual, strict=True))
    made = {name: None if t is None else t.detach().to(dtype).contiguous() for name, t in w.items()}
    return FoldedWeights(**made)
