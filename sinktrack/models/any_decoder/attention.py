"""Attention where functions of torch compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinktrack.attention import Attended, attend, edit_mask, read_scores
from sinktrack.errors import MeasurementError
from sinktrack.events import Uneditable
from sinktrack.models.any_decoder.by_value import alike, close
from sinktrack.models.any_decoder.watched import Watched
from sinktrack.models.tracer import Mark, mark

UNMASKED = "_sinktrack_unmasked"
"""Of scores, what they were before a mask was put on them."""
_HIDDEN = -9e3
"""Scores below, of keys with no measurable probability, hide them: masks write -1e4 or -1e9 too."""


class Attentions(Watched):
    """The attentions of a pass."""

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors say where."""
        try:
            yield
        except Uneditable:
            raise
        except MeasurementError as error:
            raise self.refuse(str(error)) from error

    def show(self, how: str, attended: Attended, output: Tensor | None) -> None:
        """An attention of the block, what computed it, and its output ``[B, H, T, Dv]``."""
        if not self.inside:
            raise self.refuse("attention is computed outside of the blocks; not supported")
        self.attended += 1
        if how not in self.found.how:
            self.found.how.append(how)
        heads = attended.p0.shape[1]
        self.found.most_heads = max(self.found.most_heads or 0, heads)
        with self.named():
            self.observer.attention(self.block, attended)
        if output is not None:
            self.yields(output[:, :, 0].detach().float().flatten(1), output)

    def yields(self, heads: Tensor | None, output: Tensor) -> None:
        """P0's rows ``[B, H * Dv]`` of what its heads yield, and that of all positions."""
        self.heads = heads
        if self.editor is None and heads is not None and self.block in self.yielded:
            size = output.detach().float().square().sum() / (self.batch * self.length)
            self.yielded[self.block] = (self.yielded[self.block][0], heads, size.sqrt())

    def softmax(self, scores: Tensor) -> tuple[Tensor, Mark] | None:
        """Scores ``[B, ..., T, T]`` enter a softmax."""
        length = self.length
        if scores.ndim not in (4, 5) or tuple(scores.shape[-2:]) != (length, length):
            if scores.ndim == 3 and tuple(scores.shape[-2:]) == (length, length):
                self.went_as_attention = (
                    f"a softmax over {tuple(scores.shape)}, of which sequence and head cannot be "
                    "told: view the scores as [B, H, T, T]"
                )
            elif scores.ndim > 3:
                self._other_scores(scores)
            return None
        if scores.shape[0] != self.batch:
            self._other_scores(scores)
            return None
        with self.flow.paused(), self.named():
            wide = scores.flatten(1, -3).float()
            least = wide.logsumexp(-1, keepdim=True) - 80
            wide = wide.masked_fill((wide <= _HIDDEN) & (wide < least), -torch.inf)
            changed = self._unmasked(scores, wide)
            if changed is not None:
                wide = changed
                scores = changed.view(scores.shape).to(scores.dtype)
            attended = read_scores(wide, self.observer.second_key, changed is not None)
        with self.flow.paused():
            self.show("softmax", attended, None)
        self.unmixed = True
        return scores, Mark("weights", heads=wide.shape[1])

    def _other_scores(self, scores: Tensor) -> None:
        """They are no scores of all positions over all."""
        self.went_as_attention = (
            f"a softmax over {tuple(scores.shape)} for tokens {tuple(self.tokens.shape)}, wanted "
            "[B, H, T, T]: memory keys, a sink's logit as one more key (softmax1) and chunks of a "
            "sequence are not supported"
        )

    def edit_mask(self, seen: Tensor) -> Tensor | None:
        """Other keys that the editor lets the queries see."""
        wanted = self.editor.mask(self.block, seen) if self.editor else None
        self.masked = self.masked or wanted is not None
        return wanted

    def _unmasked(self, scores: Tensor, wide: Tensor) -> Tensor | None:
        """Scores ``[B, H, T, T]`` with another mask, if the editor wants one."""
        seen = wide > -torch.inf
        wanted = self.edit_mask(seen)
        if wanted is None:
            return None
        if bool((wanted & ~seen).any()):
            before = getattr(scores, UNMASKED, None)
            before = None if before is None else before.expand(scores.shape).flatten(1, -3).float()
            if before is None or not torch.equal(before[seen], wide[seen]):
                raise self.uneditable(
                    "its scores are masked before they can be seen, and no query can be shown a "
                    "later key"
                )
            wide = torch.where(seen, wide, before)
        return wide.masked_fill(~wanted, -torch.inf)

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """In place of torch's."""
        with self.flow.paused():
            if query.ndim != 4 or (query.shape[0], query.shape[2]) != (self.batch, self.length):
                raise self.refuse(
                    f"scaled_dot_product_attention over queries {tuple(query.shape)} for tokens "
                    f"{tuple(self.tokens.shape)}, wanted [B, H, T, D]: chunks of a sequence, "
                    "sequences in a row and heads among the sequences are not supported"
                )
            if key.shape[2] != self.length:
                raise self.refuse(
                    f"scaled_dot_product_attention over {key.shape[2]} keys for {self.length} "
                    "positions: memory keys, a key of zeros (softmax1) and caches are not supported"
                )
            if attn_mask is None and not is_causal:
                raise self.refuse("attention that is not causal has no P0 sink")
            if key.shape[1] != query.shape[1] and not enable_gqa and key.shape[1] != 1:
                raise self.refuse(
                    f"{query.shape[1]} query heads over {key.shape[1]} key heads without enable_gqa"
                )
            mask = None if attn_mask is None else self._mask(attn_mask)
            wanted = query.shape[-1] ** -0.5 if scale is None else scale
            with self.named():
                edited = edit_mask(mask, self.edit_mask, query) if self.editor else mask
                output, attended = attend(
                    query, key, value, scale=wanted, mask=edited,
                    second_key=self.observer.second_key,
                    allow_future_keys=edited is not mask,
                    with_mixing=self.observer.with_mixing,
                )  # fmt: skip
            self.show("SDPA", attended, output)
        mark(output, Mark("mixed", heads=query.shape[1]))
        return output

    def _mask(self, mask: Tensor) -> Tensor:
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        mask = mask.expand(*mask.shape[:2], self.length, self.length)
        if mask.dtype != torch.bool:
            mask = mask.masked_fill(mask <= _HIDDEN, -torch.inf)
        seen = mask[..., 0] if mask.dtype == torch.bool else mask[..., 0] > -torch.inf
        if not bool((seen == seen[:, :1]).all()):
            raise self.refuse("its heads differ in which queries see P0; not supported")
        return mask

    def flex(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Flex attention in eager mode, which computes all scores too."""
        result = function(*args, **kwargs)
        query, key, value, score_mod, block_mask, scale = args[:6]
        buffers, mask_buffers = (
            (args[7] if len(args) > 7 else ()),
            (args[8] if len(args) > 8 else ()),
        )
        batch, heads, length, _ = query.shape
        if (batch, length) != (self.batch, self.length) or key.shape[2] != length:
            raise self.refuse(
                f"flex_attention over queries {tuple(query.shape)} and keys {tuple(key.shape)} for "
                f"tokens {tuple(self.tokens.shape)}; not supported"
            )
        with self.flow.paused(), self.named():
            group = heads // key.shape[1]
            keys = key.float().repeat_interleave(group, 1)
            scores = query.float() @ keys.mT * scale
            at = [torch.arange(n, device=query.device) for n in (batch, heads, length, length)]
            scores = _over_all(lambda s, *i: score_mod(s, *i, *buffers), scores, at)
            seen = _over_all(lambda s, *i: block_mask[-1](*i, *mask_buffers), scores, at)
            wanted = self.edit_mask(seen)
            scores = scores.masked_fill(~(seen if wanted is None else wanted), -torch.inf)
            attended = read_scores(scores, self.observer.second_key, wanted is not None)
            values = value.float().repeat_interleave(group, 1)
            own = scores.softmax(-1).nan_to_num() @ values
            if wanted is not None:
                result[0].copy_(own)
            elif not alike(own, result[0]):
                raise MeasurementError(
                    "flex_attention gives something else than softmax attention of its arguments"
                )
            self.show("flex attention", replace(attended, value=value), result[0])
        mark(result[0], Mark("mixed", heads=heads))
        self.flow.score(tuple(result[1:]))
        return result

    def multi_head(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``nn.MultiheadAttention``'s function, step by step."""
        names = (
            "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight",
            "in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight",
            "out_proj_bias", "training", "key_padding_mask", "need_weights", "attn_mask",
            "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight",
            "static_k", "static_v", "average_attn_weights", "is_causal",
        )  # fmt: skip
        given = dict(zip(names, args, strict=False)) | kwargs
        for name in ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask"):
            if given.get(name) is not None:
                raise self.refuse(
                    f"multi_head_attention_forward with {name}: memory keys and padding are not "
                    "supported"
                )
        if given.get("add_zero_attn"):
            raise self.refuse("multi_head_attention_forward with add_zero_attn is not supported")
        query, heads = given["query"], given["num_heads"]
        if query.ndim != 3 or query.shape[:2] != (self.length, self.batch):
            raise self.refuse(
                f"multi_head_attention_forward over {tuple(query.shape)}, wanted [T, B, D]"
            )
        with self.flow.paused():
            expected = function(*args, **kwargs)[0]
        weights = given["in_proj_weight"]
        parts = (
            [given[f"{name}_proj_weight"] for name in "qkv"]
            if given.get("use_separate_proj_weight")
            else list(weights.chunk(3))
        )
        bias = given.get("in_proj_bias")
        biases = [None] * 3 if bias is None else list(bias.chunk(3))

        def split(name: str, place: int) -> Tensor:
            value = F.linear(given[name], parts[place], biases[place])
            by_head: Tensor = value.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
            return by_head

        with self.flow.paused():
            q, k, v = (split(name, place) for place, name in enumerate(("query", "key", "value")))
            mask, causal = given.get("attn_mask"), given.get("is_causal") or False
            if mask is not None and mask.ndim == 3:
                mask = mask.unflatten(0, (self.batch, heads))
            if mask is not None and mask.dtype == torch.bool:
                mask = ~mask  # true hides in this function
        with self.flow:
            mixed = self.scaled_dot_product_attention(q, k, v, mask, 0.0, causal and mask is None)
            mixed = mixed.permute(2, 0, 1, 3).flatten(2)
            output = F.linear(mixed, given["out_proj_weight"], given["out_proj_bias"])
        self.flow.derive(output)
        if not self.masked and not alike(output, expected):
            raise self.refuse("multi_head_attention_forward gives another output than is known")
        return output, None

    def gate(self, mixed: Tensor, gate: Tensor, heads: int) -> None:
        """The heads are multiplied with something."""
        if self.heads is None:
            return
        width = self.heads.shape[1]
        for view in self._head_views(mixed, heads):
            if view.shape[-1] * heads != width:
                continue
            if close(view[:, 0].flatten(1).float(), self.heads, view.dtype):
                gates = next(g for g in self._head_views(gate.expand_as(mixed), heads, mixed, view))
                self.heads = (view[:, 0] * gates[:, 0]).flatten(1).float()
                self.observer.gate(self.block, gates.mean(-1, dtype=torch.float32))
                return

    def _head_views(
        self, value: Tensor, heads: int, like: Tensor | None = None, view: Tensor | None = None
    ) -> Iterator[Tensor]:
        """``[B, T, H, Dv]`` of heads in the orders in which they may stand."""
        shape = (self.batch, self.length)
        if value.numel() % (shape[0] * shape[1] * heads):
            return
        each = value.numel() // (shape[0] * shape[1] * heads)
        turned = [
            value.reshape(*shape, heads, each),
            value.reshape(shape[0], heads, shape[1], each).transpose(1, 2),
            value.reshape(shape[1], shape[0], heads, each).transpose(0, 1),
        ]
        if like is None or view is None:
            yield from turned
            return
        for own, other in zip(turned, self._head_views(like, heads), strict=True):
            if torch.equal(other, view):
                yield own

    def reweighted(self) -> None:
        """As of `Watcher`."""
        raise self.refuse(
            "its attention's probabilities are changed after the softmax (talking heads, or a "
            "factor), so what meets the values is not softmax attention; not supported"
        )

    def joined(self) -> None:
        """As of `Watcher`."""
        raise self.refuse(
            "something is added to what its heads attend to, beside the softmax; not supported"
        )


def _over_all(function: Callable[..., Tensor], scores: Tensor, at: list[Tensor]) -> Tensor:
    """A function of a score and its four indices, over all of ``[B, H, T, T]``."""
    for place in range(3, -1, -1):
        dims: list[int | None] = [None] * 4
        dims[place] = 0
        function = torch.vmap(function, in_dims=(0, *dims))
    return function(scores, *at).expand(scores.shape)
