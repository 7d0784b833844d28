"""No golden is forgotten."""

from pathlib import Path

from tests import golden


def test_every_kind_of_golden_has_a_test():
    texts = [path.read_text() for path in Path(__file__).parent.rglob("test_*.py")]
    untested = {kind for kind in golden.kinds() if not any(f'"{kind}"' in text for text in texts)}
    assert not untested
