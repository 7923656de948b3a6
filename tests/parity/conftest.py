"""Prints one line per compared array at the end of a parity run, and what was left out."""

import collections


def pytest_terminal_summary(terminalreporter):
    lines, left_out, gone = [], collections.defaultdict(list), []
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if getattr(report, "when", "") != "call":
                    continue
                if name == "parity":
                    lines.append(value)
                elif name == "gone":
                    gone.append(value)
                elif name == "left_out":
                    kind, *counts = value
                    left_out[kind].append(counts)
    if lines:
        terminalreporter.section("parity: fixture, array, max error, bound, error over bound")
        for line in lines:
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"{len(lines)} arrays compared")
        terminalreporter.section("parity: fixture, arrays compared, largest error over bound")
        over = collections.defaultdict(list)
        for line in lines:
            is_saved = (
                "%" in line
            )  # frames in whole grey levels: their share is bounded, not a ratio
            over[line.split()[0]].append(0.0 if is_saved else float(line.split()[-2]))
        for fixture, ratios in sorted(over.items()):
            terminalreporter.write_line(f"{fixture:<40} {len(ratios):5} {max(ratios):7.2f}")
    if gone:
        terminalreporter.section("parity: left out, asks for an option that is gone")
        for case, option in gone:
            terminalreporter.write_line(f"{case:<56} {option}")
    if left_out:
        terminalreporter.section("parity: left out, no runner knows it")
        for kind, counts in sorted(left_out.items()):
            fixtures, arrays = map(sum, zip(*counts))
            what = f"{fixtures} fixture(s), {arrays} arrays" if fixtures else "an empty folder"
            terminalreporter.write_line(f"{kind:<40} {what}")
