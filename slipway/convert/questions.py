"""Questions about layers that may be next to a flatten or a reshape to a map.

If a flatten is missed, the weights load in torch and compute wrong numbers. So every possible
flatten leads to a question. Layers are read in the order of their attributes. The criterion:
channels of convolutions that divide a layer's inputs or outputs. Not here: the orders of known
flattens (flattening.py).
"""

from collections.abc import Collection, Iterator, Sequence

from slipway.convert.flattening import Told
from slipway.convert.layers import Layer

_EXAMPLE = "or example=, an input of the module, from which every reshape follows"


def open_questions(
    layers: Sequence[Layer], flatten: Told, unflatten: Told, followed: Collection[str]
) -> list[str]:
    """Return one question for each layer that may be next to an unknown reshape.

    ``followed``: paths of layers that an example has reached.
    """
    reader = _Reader(layers, flatten, unflatten, is_followed=bool(followed))
    return [
        question
        for at, layer in enumerate(layers)
        if layer.dotted not in followed and not layer.is_conv
        for question in (*reader.inputs(at), *reader.outputs(at))
    ]


class _Reader:
    """Layers of a module in the order of their attributes."""

    def __init__(self, layers: Sequence[Layer], flatten: Told, unflatten: Told, is_followed: bool):
        self.layers = layers
        self.flatten = flatten
        self.unflatten = unflatten
        self.convs = [at for at, layer in enumerate(layers) if layer.is_conv]
        self.told = {
            layer.total("into") or layer.total("features")
            for layer in layers
            if flatten.get(layer.dotted)
        }
        self.has_junction = (
            is_followed
            or bool(self.told)
            or any(self._follows_conv(at) for at, layer in enumerate(layers) if not layer.is_norm)
        )

    def inputs(self, at: int) -> Iterator[str]:
        """Return a question about a flatten before a layer."""
        layer = self.layers[at]
        size = layer.total("into") or layer.total("features")
        if not size or layer.dotted in self.flatten:
            return
        if len(layer.sizes("into")) > 1 and not layer.is_attention:
            channels = {self.layers[conv].total("out") for conv in self.convs}
            if len(layer.sizes("into")) > 2 or layer.sizes("into")[-1] in channels:
                yield self._ask(
                    layer,
                    "flatten",
                    f"its input axes {layer.sizes('into')} look like a feature map",
                )
                return
        if layer.is_norm and self._is_before_map(at, size):
            yield self._ask(
                layer,
                "flatten",
                f"its {size} features may be reshaped to a convolution's feature map",
            )
        elif not self._is_clear(at, size) and any(
            size % c == 0 and c < size for c in self._channels_before(at)
        ):
            what = "features" if layer.is_norm else "inputs"
            yield self._ask(
                layer, "flatten", f"its {size} {what} look like a flattened feature map"
            )

    def outputs(self, at: int) -> Iterator[str]:
        """Return a question about a reshape to a feature map after a layer."""
        layer = self.layers[at]
        size = layer.total("out")
        if (
            not size
            or layer.is_norm
            or layer.kind == "Embed"
            or layer.dotted in self.unflatten
            or layer.is_attention
        ):
            return
        into = {self.layers[conv].total("into") for conv in self.convs}
        if len(layer.sizes("out")) > 2 or (
            len(layer.sizes("out")) > 1 and layer.sizes("out")[-1] in into
        ):
            yield self._ask(
                layer, "unflatten", f"its output axes {layer.sizes('out')} look like a feature map"
            )
        elif any(self._may_feed(at, conv, size) for conv in self.convs):
            yield self._ask(
                layer,
                "unflatten",
                f"its {size} outputs may be reshaped to a convolution's feature map",
            )

    def _ask(self, layer: Layer, field: str, why: str) -> str:
        path = layer.dotted
        return (
            f"{path}: {why}; give which one in {field}={{{path!r}: (height, width, channels)}}, or "
            f"{field}={{{path!r}: None}} if there is none, {_EXAMPLE}"
        )

    def _before(self, at: int) -> Layer | None:
        """Return the last layer before ``at`` that makes other features."""
        return next((layer for layer in reversed(self.layers[:at]) if layer.total("out")), None)

    def _follows_conv(self, at: int) -> bool:
        """Return whether a layer takes the channels of the convolution before it.

        It does so after a pool, or along them.
        """
        layer, before = self.layers[at], self._before(at)
        size = layer.total("into") or layer.total("features")
        if layer.is_conv or before is None or not before.is_conv or size != before.total("out"):
            return False
        return layer.is_norm or not any(size % c == 0 and c < size for c in self._last_channels())

    def _is_clear(self, at: int, size: int) -> bool:
        """Return whether adjacent layers show that a layer follows no flatten."""
        layer, before = self.layers[at], self._before(at)
        if self._follows_conv(at):
            return True
        behind = next((other for other in self.layers[at + 1 :] if not other.is_norm), None)
        if layer.is_norm and behind is not None and behind.is_conv and behind.total("into") == size:
            return True
        if before is None or before.is_conv or before.total("out") != size or size in self.told:
            return False
        if before.dotted in self.unflatten and self.unflatten[before.dotted] is not None:
            return False
        divides = any(
            size % self.layers[conv].total("out") == 0 for conv in self.convs if conv < at
        )
        return self.has_junction or not divides

    def _is_before_map(self, at: int, size: int) -> bool:
        """Return whether a norm is between a layer and the reshape of its outputs to a map."""
        before = self._before(at)
        if before is None or before.is_conv or before.total("out") != size:
            return False
        told = self.unflatten.get(before.dotted)
        return told is not None or any(self._may_feed(at, conv, size) for conv in self.convs)

    def _channels_before(self, at: int) -> set[int]:
        """Return channels that a layer may take.

        These are channels of earlier convolutions, and of later ones without a feeding layer.
        """
        return {
            self.layers[conv].total("out")
            for conv in self.convs
            if conv < at
            or not any(
                not layer.is_conv
                and layer.total("out")
                and layer.total("out") % self.layers[conv].total("into") == 0
                for layer in self.layers[:conv]
            )
        }

    def _last_channels(self) -> set[int]:
        """Return the channels of convolutions that no other convolution takes."""
        taken = [(conv, self.layers[conv].total("into")) for conv in self.convs]
        return {
            self.layers[conv].total("out")
            for conv in self.convs
            if not any(
                size == self.layers[conv].total("out") and other != conv for other, size in taken
            )
        }

    def _may_feed(self, at: int, conv: int, size: int) -> bool:
        """Return whether a convolution may take a layer's outputs as a map."""
        into = self.layers[conv].total("into")
        if size % into or size == into:
            return False
        is_fed = any(
            self.layers[other].total("out") == into for other in self.convs if other != conv
        )
        if not is_fed:
            return at < conv or not self.has_junction
        behind = next((layer for layer in self.layers[at + 1 :] if not layer.is_norm), None)
        is_chained = behind is not None and not behind.is_conv and behind.total("into") == size
        return at < conv and not is_chained
