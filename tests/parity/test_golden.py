"""Every golden fixture of the original systems, array by array.

pytest tests/parity [--golden DIR]
"""

import pathlib

import pytest

from dicode_jax.errors import OptionGone
from parity import harness


def pytest_generate_tests(metafunc):
    if "fixture" in metafunc.fixturenames:
        found = [f for family in families(metafunc.config) for f in harness.find_fixtures(family)]
        metafunc.parametrize("fixture", found, ids=[f.name for f in found])


def families(config):
    root = pathlib.Path(config.getoption("golden"))
    return harness.families(root) if root.is_dir() else []


@pytest.fixture(scope="session", autouse=True)
def runners(pytestconfig):
    harness.VOCABULARIES = pytestconfig.getoption("vocabularies")
    harness.load_runners()


def test_golden_folder_holds_fixtures(pytestconfig, record_property):
    found = {family: list(harness.find_fixtures(family)) for family in families(pytestconfig)}
    for family, fixtures in found.items():
        if not fixtures:
            record_property("left_out", (family.name, 0, 0))
    assert any(found.values()), f"no golden fixture found below {pytestconfig.getoption('golden')}"


def test_matches_the_original(fixture, record_property):
    if fixture.kind not in harness.RUNNERS:
        record_property("left_out", (fixture.kind, 1, fixture.num_arrays))
        if not harness.is_known_family(fixture.kind):
            pytest.skip(f"{fixture.kind}: no runner knows the family")
        pytest.fail(f"no runner for {fixture.kind!r} ({fixture.path})")
    try:
        found = list(harness.RUNNERS[fixture.kind](fixture))
    except OptionGone as gone:
        found = [harness.LeftOut("the whole of it", gone.option)]
    gone = [case for case in found if isinstance(case, harness.LeftOut)]
    checks = [case for case in found if case not in gone]
    for case in gone:
        record_property("gone", (f"{fixture.name}, {case.name}", case.option))
    if gone and not checks:
        pytest.skip(f"{fixture.name}: {gone[0].option} is gone")
    assert checks, f"{fixture.name}: the runner compared nothing"
    for check in checks:
        record_property("parity", f"{fixture.name:<28} {check.line}")
    failed = [check.line for check in checks if not check.result[1] <= 1]
    assert not failed, f"{fixture.name}: {len(failed)} array(s) out of bound\n" + "\n".join(failed)
