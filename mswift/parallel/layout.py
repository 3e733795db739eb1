"""`ParallelLayout`: which rank does what, as a value that is checked when it is made. No torch, no processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mswift.config.splits import EVEN, PipelineSplit, parse_stages
from mswift.errors import LayoutError


@dataclass(frozen=True, slots=True)
class RankCoords:
    """Where one rank stands on each mesh axis."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, slots=True)
class ExpertCoords:
    """Where one rank stands among those that hold experts: part ``etp`` of the experts of share ``ep``, copy ``replica`` of them."""

    etp: int
    ep: int
    replica: int


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Sizes of the mesh axes; megatron-core's rank order, ``tp`` fastest, then ``cp``, ``dp``, ``pp``.

    Args:
        world: number of processes.
        tp: tensor-parallel size. pp: pipeline stages. vpp: virtual stages a pipeline rank holds (1 = none).
        cp: context-parallel size. ep: expert-parallel size. etp: tensor-parallel size inside the experts (None = 1 with experts spread, else tp).
        split: which layers each stage holds.

    Raises:
        LayoutError: a size below 1, or a product that does not divide the world; every factor is printed.
    """

    world: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    split: PipelineSplit = EVEN

    def __post_init__(self) -> None:
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "ep": self.ep, "etp": self.expert_tp, "world": self.world}
        for axis, size in sizes.items():
            if size < 1:
                raise LayoutError(f"parallel layout: {axis} is {size}, wanted at least 1; all sizes: {self.describe()}")
        model = self.tp * self.pp * self.cp
        if self.world % model:
            raise LayoutError(
                f"parallel layout: tp({self.tp}) x pp({self.pp}) x cp({self.cp}) = {model} does not divide {self.world} process(es); "
                f"start a multiple of {model} processes (NPROC_PER_NODE={model}) or make the sizes smaller"
            )
        expert = self.expert_tp * self.ep * self.pp
        if self.world % expert:
            raise LayoutError(
                f"parallel layout: etp({self.expert_tp}) x ep({self.ep}) x pp({self.pp}) = {expert} does not divide {self.world} process(es); "
                f"start a multiple of {expert} processes or make the sizes smaller"
            )
        if self.ep == 1 and self.expert_tp != self.tp:
            raise LayoutError(
                f"parallel layout: etp({self.expert_tp}) with ep(1) and tp({self.tp}); experts that are not spread are split as the layers are: "
                f"make etp {self.tp}, or ep larger"
            )
        if self.vpp > 1 and self.pp == 1:
            raise LayoutError(f"parallel layout: vpp({self.vpp}) needs pp of at least 2, got pp({self.pp}); drop the virtual stages")
        if self.split.text is not None and len(stages := parse_stages(self.split.text)) != self.pp * self.vpp:
            raise LayoutError(
                f"parallel layout: {len(stages)} stage(s) in {self.split.text} by pp({self.pp}) x vpp({self.vpp}) = {self.pp * self.vpp}; "
                "wanted as many; mend --pipeline_model_parallel_layout or the sizes"
            )

    @classmethod
    def smallest(
        cls,
        *,
        tp: int = 1,
        pp: int = 1,
        vpp: int = 1,
        cp: int = 1,
        ep: int = 1,
        etp: int | None = None,
        split: PipelineSplit = EVEN,
    ) -> ParallelLayout:
        """The layout of these sizes with the fewest processes."""
        expert = (etp or (tp if ep == 1 else 1)) * ep
        return cls(math.lcm(tp * cp, expert) * pp, tp, pp, vpp, cp, ep, etp, split)

    def layers_of_stages(self, num_layers: int) -> tuple[int, ...]:
        """Layers of every virtual stage in the order of the layers: that of rank 0, of rank 1, ..., then again rank 0."""
        return self.split.counts(num_layers, self.pp, self.vpp)

    @property
    def expert_tp(self) -> int:
        return (self.tp if self.ep == 1 else 1) if self.etp is None else self.etp

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def independent_copies(self) -> int:
        """Copies of the model that can compute each at its own pace: copies that share experts go step by step together."""
        return self.dp if self.ep == 1 else 1

    def coords(self, rank: int) -> RankCoords:
        """The coordinates of ``rank`` (0 <= rank < world) on the dense mesh."""
        if not 0 <= rank < self.world:
            raise LayoutError(f"rank {rank} is outside 0..{self.world - 1}")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return RankCoords(tp, cp, dp, pp)

    @property
    def expert_replicas(self) -> int:
        """Copies of each expert."""
        return self.world // (self.expert_tp * self.ep * self.pp)

    def expert_coords(self, rank: int) -> ExpertCoords:
        """The coordinates of ``rank`` on the expert mesh: ``etp`` fastest, then ``ep``, then copies; stages as on the dense mesh."""
        rest, etp = divmod(rank % (self.world // self.pp), self.expert_tp)
        replica, ep = divmod(rest, self.ep)
        return ExpertCoords(etp, ep, replica)

    def rank_of(self, coords: RankCoords) -> int:
        return coords.tp + self.tp * (coords.cp + self.cp * (coords.dp + self.dp * coords.pp))

    def check_model(
        self,
        *,
        num_layers: int,
        ffn_size: int,
        num_experts: int | None = None,
        expert_size: int = 0,
        key_heads_of_delta_nets: int = 0,
        narrow: tuple[int, ...] = (),
    ) -> None:
        """Refuse a model that this layout cannot split evenly; every factor is printed. (Attention heads and vocabulary are padded, exactly.)

        Args:
            ffn_size: MLP width. num_experts: of a layer, 0 for none, None where that is not known yet. expert_size: MLP width of one.
            narrow: widths of the narrow layers of latent attention.

        Raises:
            LayoutError: the MLP, the delta nets or a narrow layer do not divide by tp, layers by pp x vpp, experts by ep, or an expert by etp.
        """
        faults = [f"narrow layer of {width} columns by tp({self.tp})" for width in narrow if width % self.tp]
        if ffn_size % self.tp:
            faults.append(f"MLP width {ffn_size} by tp({self.tp})")
        if num_experts is not None and (num_experts % self.ep or (self.ep > 1 and not num_experts)):
            faults.append(f"{num_experts} experts by ep({self.ep})")
        if expert_size % self.expert_tp:
            faults.append(f"expert width {expert_size} by etp({self.expert_tp})")
        if key_heads_of_delta_nets % self.tp:
            faults.append(f"{key_heads_of_delta_nets} key heads of delta nets by tp({self.tp})")
        faults += self.split.faults(num_layers, self.pp, self.vpp)
        if faults:
            raise LayoutError(f"parallel layout {self.describe()} does not divide this model: {'; '.join(faults)}; choose sizes that divide them")

    def describe(self) -> str:
        """One short text, such as ``tp2 pp1 dp1 (2 processes)``."""
        axes = [f"tp{self.tp}", f"pp{self.pp}"]
        axes += [f"({self.split.describe()})"] if not self.split.is_even else []
        axes += [f"{name}{size}" for name, size in (("vpp", self.vpp), ("cp", self.cp), ("ep", self.ep)) if size != 1]
        axes += [f"etp{self.expert_tp}"] if self.ep != 1 and self.expert_tp != 1 else []
        model = max(1, self.tp * self.pp * self.cp)
        return f"{' '.join(axes)} dp{self.world // model} ({self.world} process{'es' if self.world != 1 else ''})"
