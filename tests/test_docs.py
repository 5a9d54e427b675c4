"""Every Python snippet of the README and of the documentation runs, each page in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import load

import regfast

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```$", flags=re.M | re.S)


def snippets(page: Path) -> list[str]:
    return SNIPPET.findall(page.read_text())


def loader(batches: int) -> Any:
    """Batches of float images and class indices, with the length of their data set."""
    found = [(torch.randn(2, 3, 64, 64), torch.randint(10, (2,))) for _ in range(batches)]
    dataset = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*found)))
    return torch.utils.data.DataLoader(dataset, batch_size=2)


def names_of(page: Path) -> dict[str, Any]:
    """The names that a page uses without defining them."""
    if page.name != "README.md":
        return {}
    images, labels = torch.rand(4, 3, 40, 40), torch.randint(10, (4,))
    given = dict(classes=10, epochs=1, train_loader=loader(2), test_loader=loader(1))
    return given | dict(images=images, labels=labels)


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.name)
def test_snippets_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("torchvision")
    names = {"torch": torch, "regfast": regfast, **names_of(page)}
    with regfast.backend("auto"):
        for number, snippet in enumerate(snippets(page)):
            exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), names)
    if page.name == "README.md":
        assert "epoch 0: accuracy" in capsys.readouterr().out


def test_the_readme_is_short_and_its_links_are_absolute() -> None:
    """A package index shows the README, and relative links lead nowhere there."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and [link for link in links if not link.startswith("https://")] == []


def test_links_to_files_of_the_repository_lead_to_files() -> None:
    repository = (
        "https://(?:github.com|raw.githubusercontent.com)/regfast/regfast/(?:(?:blob|tree)/)?main/"
    )
    found = [
        (page, path)
        for page in PAGES
        for path in re.findall(repository + r"([^)#\s]+)", page.read_text())
    ]
    assert found
    assert [(page.name, path) for page, path in found if not (ROOT / path).exists()] == []
