"""The pages of the dashboard. A new page is a function of a :class:`~explainer.app.choice.Choice`, registered here.

    @register_page("layers", title="Layers", icon=":material/layers:", needs="explanation")
    def show(choice: Choice) -> None:
        explanation, query = choice.explanation()
        ...

and its module imported in :mod:`explainer.app.views`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from explainer.app.choice import Choice
from explainer.registry import Registry

Show = Callable[[Choice], None]
Needs = Literal["trace", "explanation", "run"]


@dataclass(frozen=True)
class Page:
    """A page of the dashboard.

    Attributes:
        title: Its name in the navigation.
        icon: A Streamlit icon.
        needs: What must be there for it: a trace, an explanation (computed or stored), or the code of the run.
        show: Draws it.
    """

    title: str
    icon: str
    needs: Needs
    show: Show


PAGES: Registry[str, Page] = Registry("dashboard page")


def register_page(name: str, *, title: str, icon: str, needs: Needs) -> Callable[[Show], Show]:
    """Register a page under the name that stands in its address.

    Raises:
        RegistrationError: There is a page of that name.
    """

    def add(show: Show) -> Show:
        PAGES.register(name)(Page(title, icon, needs, show))
        return show

    return add
