"""Every golden fixture of the original systems, array by array.

pytest tests/parity [--golden DIR]
"""

import pathlib

import pytest

from parity import harness


def pytest_generate_tests(metafunc):
    root = pathlib.Path(metafunc.config.getoption("golden"))
    if "fixture" in metafunc.fixturenames:
        found = list(harness.find_fixtures(root))
        metafunc.parametrize("fixture", found, ids=[f.name for f in found])


@pytest.fixture(scope="session", autouse=True)
def runners(pytestconfig):
    harness.VOCABULARIES = pytestconfig.getoption("vocabularies")
    harness.load_runners()


def test_golden_folder_holds_fixtures(pytestconfig):
    root = pathlib.Path(pytestconfig.getoption("golden"))
    assert list(harness.find_fixtures(root)), f"no golden fixture found below {root}"


def test_matches_the_original(fixture, record_property):
    assert fixture.kind in harness.RUNNERS, f"no runner for {fixture.kind!r} ({fixture.path})"
    checks = list(harness.RUNNERS[fixture.kind](fixture))
    assert checks, f"{fixture.name}: the runner compared nothing"
    for check in checks:
        record_property("parity", f"{fixture.name:<28} {check.line}")
    failed = [check.line for check in checks if not check.result[1] <= 1]
    assert not failed, f"{fixture.name}: {len(failed)} array(s) out of bound\n" + "\n".join(failed)
