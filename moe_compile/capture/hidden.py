"""Which attributes modules that are alike may differ in: those that their code never looks at."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from moe_compile.capture.boundary import Attribute
from moe_compile.capture.untouched import TouchedAttribute

T = TypeVar("T", covariant=True)


class Trace(Protocol[T]):
    """Makes a capture that holds for any value of the hidden attributes."""

    def __call__(self, *, hidden: set[Attribute]) -> T:
        """Raises `TouchedAttribute` where the code looks at one of them."""
        ...


@dataclass
class Hidden:
    """What traces of modules of one kind, called in one way, have shown.

    Attributes:
        unread: the attributes that captures hold for any value of.
        decisive: those that the code looks at.
    """

    unread: set[Attribute] = field(default_factory=set[Attribute])
    decisive: set[Attribute] = field(default_factory=set[Attribute])

    def capture(self, trace: Trace[T], differing: Iterable[Attribute]) -> T:
        """What `trace` gives for as many hidden attributes as its code allows.

        Args:
            trace: is called until no hidden attribute is looked at.
            differing: in what the module differs from one that is captured already.
        """
        self.unread |= {attribute for attribute in differing if attribute not in self.decisive}
        while True:
            try:
                return trace(hidden=self.unread)
            except TouchedAttribute as touched:
                self.decisive.add(touched.attribute)
                self.unread.remove(touched.attribute)
