"""CITATION.cff: the fields that the Citation File Format 1.2.0 wants, and the version of the package."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import crisp

ROOT = Path(__file__).parents[1]
# Of the format's schema: what must be there, and what may.
REQUIRED = {"cff-version", "message", "title", "authors"}
ALLOWED = REQUIRED | {
    "abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license", "license-url",
    "preferred-citation", "references", "repository", "repository-artifact", "repository-code", "type", "url",
    "version",
}  # fmt: skip
PERSON = {"family-names", "given-names", "name-particle", "name-suffix", "affiliation", "orcid", "email", "website"}
ENTITY = {"name", "address", "city", "country", "email", "orcid", "website", "date-start", "date-end"}


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    return content


def check_authors(authors: list[dict[str, str]]) -> None:
    assert authors
    for author in authors:
        assert set(author) <= (ENTITY if "name" in author else PERSON)
        assert all(isinstance(value, str) and value for value in author.values())


def test_structure(citation: dict[str, Any]) -> None:
    assert set(citation) >= REQUIRED
    assert set(citation) <= ALLOWED
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert all(isinstance(citation[name], str) for name in ("message", "title", "abstract", "license", "version"))
    check_authors(citation["authors"])
    assert len(set(citation["keywords"])) == len(citation["keywords"])


def test_it_is_this_software(citation: dict[str, Any]) -> None:
    assert citation["title"] == "crisp"
    assert citation["version"] == crisp.__version__
    assert citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_paper_is_referred_to(citation: dict[str, Any]) -> None:
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["type"] == "article"
    assert "Consistent Region-Informed Self-Supervised Pretraining" in paper["title"]
    check_authors(paper["authors"])
