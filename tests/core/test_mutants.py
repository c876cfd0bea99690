"""The list of deliberate mutations speaks of the program as it is."""

from __future__ import annotations

import pytest

from tests.mutants.__main__ import MUTATIONS, REPOSITORY, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.promise)
def test_each_mutation_is_one_line_of_the_program(mutation: Mutation) -> None:
    """One that is applied nowhere would count as noticed, or as a survivor, for no reason."""
    assert (REPOSITORY / "vllmd" / mutation.file).read_text().count(mutation.old) == 1
    assert (REPOSITORY / "tests" / mutation.tests).exists()
