"""Prints one line per compared array at the end of a parity run."""


def pytest_terminal_summary(terminalreporter):
    lines = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "parity" and getattr(report, "when", "") == "call":
                    lines.append(value)
    if not lines:
        return
    terminalreporter.section("parity: fixture, array, max error, bound, error over bound")
    for line in lines:
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"{len(lines)} arrays compared")
