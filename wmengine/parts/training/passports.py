"""Signs of the scales that passports give, and the branch of the network that runs on them."""

from __future__ import annotations

from dataclasses import dataclass

from wmengine.parts.base import Course, Setting
from wmengine.parts.fields import one_of, positive

BRANCHES = ("deployed", "shared", "separate")


@dataclass(frozen=True)
class PassportSigns:
    """strength · Σ max(0, margin − s·γ) over the marked channels, s = ±1 the bits (the sign loss of Fan et al. 2019, as
    their code sums it), plus the cross entropy of a branch in which passports give the marked normalisations' scales
    and shifts.

    branch: "deployed", the network runs on its passports itself (`wmengine.passport` puts them in); "shared", a private
    branch beside the plain network, with its weights and the running statistics of its normalisations; "separate", with
    statistics of its own (Zhang et al. 2020, whose two trained layers behind γ and β are left out, as their sign loss
    is of γ before them). In the code of Fan et al. a private branch writes to the shared statistics too, and the plain
    network, which is what is shipped, pays for that in accuracy; here none writes but the plain network. A private
    branch is trained on every batch that `mix` was given, triggers: with the trigger rows of other schemes in it, and
    costs a second run of the network. γ is the paper's times the sign of the plain network's own scale, as the mark is
    read. The decay of γ (1e-5) in the authors' code is left out.
    """

    strength: float = 0.1
    margin: float = 0.1
    branch: str = "shared"
    triggers: bool = False

    def __post_init__(self) -> None:
        positive("strength", self.strength)
        positive("margin", self.margin)
        one_of("branch", self.branch, BRANCHES)

    @property
    def takes(self) -> tuple[str, ...]:
        return ("passport",) if self.branch == "deployed" else ()

    def begin(self, setting: Setting) -> Course:
        """Raises ValueError where the network is not prepared for its kind of passports."""
        from wmengine.parts.training.passport_course import PassportCourse

        return PassportCourse(self, setting)
