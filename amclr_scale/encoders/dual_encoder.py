"""Two towers, two heads, one learned scale: pictures and captions become unit vectors of one space.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv:2103.00020.

b  samples    V  further views    H, W  pixels    L  tokens    n  tokens that are compared    D  embedding width

Everything goes through `forward`, because ZeRO's stage 3 fetches parameters around it and nowhere else. All views of
a modality go through their tower in one pass. Features are brought to unit length in float32 at least, whatever the
towers compute in.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale.encoders.decay import exempt
from amclr_scale.encoders.freezing import Kept, hold_still, is_trained
from amclr_scale.encoders.recomputation import Recomputation, blocks, set_recomputation
from amclr_scale.encoders.resting import RestingTower
from amclr_scale.encoders.taps import Taps
from amclr_scale.encoders.text_towers import PooledTower
from amclr_scale.encoders.tokens import Place, Side, check_tokens
from amclr_scale.errors import UserError
from amclr_scale.precision import products_of

Encoded = tuple[Tensor, Tensor, Tensor | None]  # the tower's features, the head's, and which tokens there are
LOG_SCALE_BOUNDS = (0.0, math.log(100))  # CLIP's: a temperature between 0.01 and 1


class Normalise(nn.Module):
    """uint8 (or float in [0, 1]) images -> (x - mean) / std per channel, in the tower's precision."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Follow the model to its device, but stay float32 when it becomes bf16."""
        return cast(nn.Module, super()._apply(lambda t: t.to(fn(t).device), recurse))  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        x = images.to(torch.float64 if dtype == torch.float64 else torch.float32, memory_format=torch.channels_last)
        return ((x - scale * self.mean) / (scale * self.std)).to(dtype)


class DualEncoder(nn.Module):
    """Image and text towers with their heads.

    Args:
        image_tower: (b, 3, H, W) -> (b, width).
        text_tower: (b, L) -> (b, width).
        temperature: start value of 1 / logit_scale.
        image_tokens: where the image tower has features of patches (encoders/tokens.py); None: nowhere.
        notes: what a user should know about this model before training it.

    Attributes:
        widths: of the towers' features, by modality.
        logit_scale: (1,), the LOGARITHM of the scale; outputs carry the scale itself.
        parts: what an objective trains beside the towers, from `take_parts` (`Objective.model_parts` describes it).
        further_views: V by modality; what comes behind them are hard negatives. Without, all further ones are views.
        unit_rows: bring embeddings to unit length; False while training an objective that needs their length (VICReg).
        taps: by modality, inner layers whose features are given too (encoders/taps.py), of the first view alone.
        kept: of towers that are frozen, the modules that train all the same (encoders/freezing.py).
        depths: of the towers' parameters by name, where they were asked for (encoders/depths.py).
        tokens: of which sides every forward gives tokens too, as the objective in training reads them.
        computes_in: how products of towers and heads are made, by a name of `execution.precision`.
    """

    def __init__(
        self,
        image_tower: nn.Module,
        image_head: nn.Module,
        text_tower: nn.Module,
        text_head: nn.Module,
        *,
        temperature: float,
        logit_bias: float,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        image_tokens: Place | None = None,
        notes: tuple[str, ...] = (),
    ):
        super().__init__()
        self.normalise = Normalise(image_mean, image_std)
        self.image_tower, self.image_head = image_tower, image_head
        self.text_tower, self.text_head = text_tower, text_head
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))  # (1,): DeepSpeed refuses ()
        self.logit_bias = nn.Parameter(torch.tensor([logit_bias]))
        self.parts: nn.Module | None = None
        self.taps = nn.ModuleDict()
        self.kept: Kept = {}
        self.depths: dict[str, int] = {}
        self.further_views: dict[str, int] = {}
        self.unit_rows = True
        self.image_tokens = image_tokens
        self.tokens: tuple[Side, ...] = ()
        self.widths: dict[str, int] = {}
        self.computes_in = "fp32"
        self.notes = notes

    def forward(
        self,
        images: tuple[Tensor, ...] = (),
        texts: tuple[Tensor, ...] = (),
        *,
        features: bool = False,
        tokens: bool | None = None,
    ) -> dict[str, Any]:
        """Encode whatever is given, and return it with all that an objective needs.

        Args:
            images: 1 + V of (b, 3, H, W), uint8 or float in [0, 1], and hard negatives; () leaves the image tower
                alone. Or as many of (b, width), or (b, 1 + n, width) with tokens, what the tower gave for them: then
                the head alone is run.
            texts: 1 + V of (b, L) int64, and hard negatives; () leaves the text tower alone. Or features, as of images.
            features: also return what the towers gave, before the heads.
            tokens: also give the tokens of what is encoded; None: where the attribute says so.

        Returns:
            image (b, D) and image_views (V of (b, D)) when there are images; text and text_views when there are texts;
            image_negatives and text_negatives, (b, D) each, where there are any; image_layers and text_layers, (b, F)
            each, where layers are tapped and no tokens asked for;
            logit_scale (1,) and logit_bias (1,); what `parts` makes of these; image_features and text_features
            (b, width) of the first view when asked for. With tokens, of the first view, image_tokens and text_tokens
            (b, n, D), unit length, n being L of texts, and image_token_mask and text_token_mask (b, n) bool, which of
            them there are. In training, of each tower that is frozen as a whole, also frozen_features: by side,
            (b (1 + V), width), or (b (1 + V), 1 + n, width), of all views, with what is tapped beside.
        """
        with products_of(self.computes_in, self.logit_scale.device):  # DeepSpeed ends an autocast around its engine
            out, frozen = self._encode(images, texts, features, tokens)
        out["logit_scale"] = _at_least_float32(self.logit_scale).exp()
        out["logit_bias"] = _at_least_float32(self.logit_bias)
        found = out if self.parts is None else {**out, **self._outputs_of_parts(out)}
        return {**found, "frozen_features": frozen} if frozen else found

    def _encode(
        self, images: tuple[Tensor, ...], texts: tuple[Tensor, ...], features: bool, tokens: bool | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What towers and heads make of it; and of frozen towers, their features by side."""
        device, dtype = self.logit_scale.device, self.logit_scale.dtype
        out: dict[str, Any] = {}
        frozen: dict[str, Tensor] = {}
        length = _unit if self.unit_rows or not self.training else _at_least_float32
        sides: tuple[tuple[Side, tuple[Tensor, ...], Any], ...]
        sides = ("image", images, self._encode_images), ("text", texts, self._encode_texts)
        for name, views, encode in sides:
            if not views:
                continue
            with_tokens = name in self.tokens if tokens is None else tokens
            stacked = torch.cat([view.to(device, non_blocking=True) for view in views])
            taps = None if with_tokens else self.taps_of(name)
            with nullcontext() if taps is None else taps.read(stacked, getattr(self, f"{name}_tower")) as read:
                raw, embedded, mask = encode(stacked if read is None else read.inputs, dtype, with_tokens)
            rows = length(embedded)
            if with_tokens:
                rows, out[f"{name}_tokens"] = _apart(rows, len(views[0]))
                if mask is not None:
                    out[f"{name}_token_mask"] = mask[: len(views[0])].clone()
            out[name], *further = torch.split(rows, [len(view) for view in views])
            count = self.further_views.get(name, len(further))
            out[f"{name}_views"] = tuple(further[:count])
            if further[count:]:
                out[f"{name}_negatives"] = tuple(further[count:])
            tapped = [] if read is None else read.features()
            if taps is not None:
                out[f"{name}_layers"] = tuple(length(x) for x in taps([x[: len(views[0])] for x in tapped]))
            if features:
                out[f"{name}_features"] = (raw if raw.dim() == 2 else raw[:, 0])[: len(views[0])]
            if self.training and not is_trained(tower := getattr(self, f"{name}_tower")) and not _rests(tower):
                frozen[name] = torch.cat([raw, *tapped], 1) if tapped else raw
        return out, frozen

    def train(self, mode: bool = True) -> "DualEncoder":
        """Training mode, in which what is frozen stays in evaluation mode; or evaluation mode."""
        super().train(mode)
        for side in ("image", "text") if mode else ():
            tower = getattr(self, f"{side}_tower")
            hold_still(tower, self.kept.get(side))
            if isinstance(tower, RestingTower):
                tower.rest()
        return self

    def rest(self, side: str) -> None:
        """Let a frozen tower rest: in training features come in place of what it would be given."""
        setattr(self, f"{side}_tower", RestingTower(getattr(self, f"{side}_tower")))
        self.kept.pop(side, None)

    def _tower(self, side: Side) -> nn.Module:
        tower = getattr(self, f"{side}_tower")
        return tower.awake(self.logit_scale) if isinstance(tower, RestingTower) else tower

    def _outputs_of_parts(self, out: dict[str, Any]) -> dict[str, Any]:
        """What the parts make of rows in the model's precision, in float32 at least."""
        assert self.parts is not None
        dtype = self.logit_scale.dtype
        rows = {name: each for name, each in out.items() if name not in ("logit_scale", "logit_bias")}
        try:
            made = self.parts({**out, **_each(rows, lambda x: x.to(dtype) if x.is_floating_point() else x)})
        except KeyError as error:
            if error.args[0] in out:
                raise
            raise UserError(
                f"objective.name: its model_parts read {error} in a call that encodes {' and '.join(out)}; "
                'a part gives what it can make of what is there: ask whether "image" or "text" is in its outputs'
            ) from error
        found: dict[str, Any] = _each(made, lambda x: _at_least_float32(x) if x.is_floating_point() else x)
        return found

    def taps_of(self, side: str) -> Taps | None:
        """Of a modality; None: no layer of its tower is tapped."""
        return cast(Taps, self.taps[side]) if side in self.taps else None

    def _encode_images(self, images: Tensor, dtype: torch.dtype, tokens: bool = False) -> Encoded:
        if images.dim() != 4:
            raw = images.to(dtype)
            return raw, self.image_head(raw), None
        tower = self._tower("image")
        if not tokens:
            raw = tower(self.normalise(images, dtype))
            return raw, self.image_head(raw), None
        check_tokens(("image",), self.image_tokens)
        assert self.image_tokens is not None
        with self.image_tokens.noted(tower) as found:
            pooled = tower(self.normalise(images, dtype))
        raw = torch.cat([pooled[:, None], self.image_tokens.rows(found[-1])], 1)
        mask = torch.ones(len(raw), raw.shape[1] - 1, dtype=torch.bool, device=raw.device)
        return raw, self.image_head(raw), mask

    def _encode_texts(self, ids: Tensor, dtype: torch.dtype, tokens: bool = False) -> Encoded:
        if ids.is_floating_point():
            raw = ids.to(dtype)
            return raw, self.text_head(raw), None
        tower = self._tower("text")
        if not tokens:
            raw = tower(ids)
            return raw, self.text_head(raw), None
        pooled, features, visible = tower(ids, with_tokens=True)
        missing = ids.shape[1] - features.shape[1]  # on a CPU the tower ends with the longest caption
        raw = F.pad(torch.cat([pooled[:, None], features], 1), (0, 0, 0, missing))
        return raw, self.text_head(raw), F.pad(visible, (0, missing))

    def caption_lengths(self, texts: tuple[Tensor, ...]) -> Tensor | None:
        """(b,) int64: after how many tokens all captions of a sample, on the host, may be cut; None: not at all.

        Where tokens or inner layers are compared too, or the tower is not one of ours, captions stay as they are.
        """
        tower, uncut = self.text_tower, "text" in self.tokens or "text" in self.taps
        if uncut or not isinstance(tower, PooledTower) or not texts:
            return None
        return torch.stack([tower.lengths(view) for view in texts]).amax(0)

    def raw_embeddings(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings before they are brought to unit length, (b, D) of pictures and of captions.

        Around `forward`, so for a model that is whole: before ZeRO's stage 3 has cut it up.
        """
        dtype = self.logit_scale.dtype
        return self._encode_images(images, dtype)[1], self._encode_texts(texts, dtype)[1]

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale in [1, 100]. For plain training loops: under DeepSpeed the fp32 master needs it too."""
        self.logit_scale.clamp_(*LOG_SCALE_BOUNDS)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not shrunk: biases, norms, positions and the like (encoders/decay.py)."""
        return set(exempt(self))

    def take_parts(self, parts: nn.Module | None) -> None:
        """Train an objective's parts beside the towers."""
        self.parts = parts
        for module in parts.modules() if parts is not None else ():
            module.register_forward_hook(_copy_parameters)

    def learning_rate_factors(self) -> dict[str, str]:
        """Beginnings of parameters' names -> the key of optimizer.lr_factors, for parts that choose theirs."""
        named = ((name, getattr(module, "learning_rate_factor", None)) for name, module in self.named_modules())
        return {name: factor for name, factor in named if factor is not None}

    def blocks(self) -> dict[str, list[nn.Module]]:
        """The blocks that activation recomputation can wrap, by tower."""
        return {"image": blocks(self.image_tower), "text": blocks(self.text_tower)}

    def set_recomputation(self, *, image: Recomputation = "none", text: Recomputation = "none") -> None:
        """Recompute none, all ("full"), or every k-th block of each tower in backward. Does not change results."""
        set_recomputation(self.image_tower, image)
        set_recomputation(self.text_tower, text)


def _rests(tower: nn.Module) -> bool:
    return isinstance(tower, RestingTower)


def _apart(rows: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """(m, 1 + n, D) -> (m, D) of everything, and tokens (samples, n, D) of the first view."""
    if samples == len(rows):
        return rows[:, 0], rows[:, 1:]
    return rows[:, 0].clone(), rows[:samples, 1:].clone()  # the tokens of other views are let go


def _each(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same, with every tensor changed, however deep in dictionaries and tuples."""
    if isinstance(outputs, dict):
        return {name: _each(output, change) for name, output in outputs.items()}
    if isinstance(outputs, tuple | list):
        return tuple(_each(output, change) for output in outputs)
    return change(outputs) if isinstance(outputs, Tensor) else outputs


def _copy_parameters(_: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Copies in place of parameters that a module returns as they are: ZeRO's stage 3 empties them after its forward.

    A forward hook, which runs before DeepSpeed's, as it is there before.
    """
    return _each(outputs, lambda x: x.clone() if isinstance(x, nn.Parameter) else x)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_at_least_float32(x), dim=-1)
