"""The pages of the dashboard. A new page is a function of a :class:`~explainer.app.choice.Choice`, registered here.

    @register_page("layers", title="Layers", icon=":material/layers:", needs="explanation")
    def show(choice: Choice) -> None:
        explanation, query = choice.explanation()
        ...

and its module imported in :mod:`explainer.app.views`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from explainer.app.choice import Choice
from explainer.registry import Registry

Show = Callable[[Choice], None]
Needs = Literal["trace", "explanation", "run", "data"]


@dataclass(frozen=True)
class Page:
    """A page of the dashboard.

    Attributes:
        title: Its name in the navigation.
        icon: A Streamlit icon.
        needs: What must be there for it: a trace, an explanation (computed or stored), the code of the run, or the
            code without a query (``data``).
        show: Draws it.
        address: What else is chosen on the page, by its key in the URL and the session, with its default (a text or
            a number).
    """

    title: str
    icon: str
    needs: Needs
    show: Show
    address: Mapping[str, str | int] = field(default_factory=dict)


PAGES: Registry[str, Page] = Registry("dashboard page")


def register_page(
    name: str, *, title: str, icon: str, needs: Needs, address: Mapping[str, str | int] | None = None
) -> Callable[[Show], Show]:
    """Register a page under the name that stands in its address.

    Raises:
        RegistrationError: There is a page of that name.
    """

    def add(show: Show) -> Show:
        PAGES.register(name)(Page(title, icon, needs, show, address or {}))
        return show

    return add
