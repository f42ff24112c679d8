"""Quantities that people type, and how they are shown again."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbench.core.errors import ConfigError
from flexbench.core.units import (
    format_bit_rate,
    format_bytes,
    parse_bit_rate,
    parse_bytes,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0B", 0),
        ("1B", 1),
        ("1 b", 1),
        ("1kB", 1000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("1kib", 1024),
        ("512MiB", 512 * 2**20),
        ("80GB", 80_000_000_000),
        ("80 GB", 80_000_000_000),
        ("  24GiB\t", 25_769_803_776),
        ("24 gib", 24 * 2**30),
        ("1.5GiB", 3 * 2**29),
        (".5GiB", 2**29),
        ("0.001kB", 1),
        ("0.3B", 0),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 * 2**40),
        ("1PB", 10**15),
        ("1PiB", 2**50),
        ("1024PiB", 2**60),
        ("007GiB", 7 * 2**30),
    ],
)
def test_bytes(text, count):
    assert parse_bytes("--gpu-memory", text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "24",
        "GiB",
        "B",
        ".GiB",
        "24G",
        "24Gi",
        "24Gib/s",
        "24GBit",
        "-1GiB",
        "+1GiB",
        "1e3GiB",
        "1,5GiB",
        "1.GiB",
        "1.2.3GiB",
        "1_000B",
        "24 GiB 1",
        "24EiB",
        "24iGB",
        "nanB",
        "infGiB",
        "0x10B",
        "2 4GiB",
        "24GiB\n24GiB",
    ],
)
def test_bytes_that_are_refused(text):
    with pytest.raises(ConfigError) as excinfo:
        parse_bytes("--gpu-memory", text)
    assert excinfo.value.option == "--gpu-memory"
    assert excinfo.value.exit_code == 2
    assert excinfo.value.problem == (
        f"must be a number with a unit, such as 24GiB, 80GB or 512MiB, not {text!r}"
    )


@pytest.mark.parametrize("text", ["1025PiB", "1153PB", "9" * 30 + "B", "9" * 400 + "B"])
def test_more_bytes_than_any_machine_has(text):
    with pytest.raises(ConfigError, match=r"^--x: \d+P?i?B is more than any machine has$"):
        parse_bytes("--x", text)


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [
        ("1bit/s", 1.0),
        ("100Mbit/s", 100e6),
        ("100 mbit/s", 100e6),
        ("100Mbps", 100e6),
        ("100 Mbits/s", 100e6),
        ("1.5Gbit/s", 1.5e9),
        (".5kbps", 500.0),
        ("10Tbit/s", 10e12),
        (" 1 GBPS ", 1e9),
        ("0.1bit/s", 0.1),
    ],
)
def test_bit_rates(text, bits_per_s):
    assert parse_bit_rate("--network", text) == pytest.approx(bits_per_s, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "100",
        "100M",
        "100Mbit",
        "100MB/s",
        "100Mibit/s",
        "100Mb/s",
        "-1bit/s",
        "1e3bit/s",
        "1Pbit/s",
        "bit/s",
        "100Mbit/ s",
        "100Mbit/s/s",
    ],
)
def test_bit_rates_that_are_refused(text):
    with pytest.raises(ConfigError) as excinfo:
        parse_bit_rate("--network", text)
    assert excinfo.value.option == "--network"
    assert excinfo.value.problem == (
        f"must be a number with a unit, such as 100Mbit/s or 1Gbit/s, not {text!r}"
    )


@pytest.mark.parametrize("text", ["0bit/s", "0.0Gbps", "1000000Tbit/s", "9" * 400 + "bps"])
def test_bit_rates_of_no_network(text):
    with pytest.raises(ConfigError, match=r"^--network: must be above 0, and less than 1e18 bit/s"):
        parse_bit_rate("--network", text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0.0),
        ("10ms", 0.01),
        ("10 MS", 0.01),
        ("0.5s", 0.5),
        (".5s", 0.5),
        ("250us", 250e-6),
        ("2min", 120.0),
        (" 1.5 min ", 90.0),
    ],
)
def test_seconds(text, seconds):
    assert parse_seconds("--rtt", text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        "ms",
        "-10ms",
        "1e-3s",
        "1h",
        "1m",
        "1 min 5 s",
        "10 sec",
        "10mss",
        "infs",
        "nans",
        # One letter s that a case-insensitive pattern takes for one, too.
        "10\N{LATIN SMALL LETTER LONG S}",
    ],
)
def test_seconds_that_are_refused(text):
    with pytest.raises(ConfigError) as excinfo:
        parse_seconds("--rtt", text)
    assert excinfo.value.option == "--rtt"
    assert excinfo.value.exit_code == 2
    assert excinfo.value.problem == (
        f"must be a number with a unit, such as 10ms or 0.5s, not {text!r}"
    )


def test_no_time_is_infinite():
    with pytest.raises(ConfigError, match=r"^--rtt: "):
        parse_seconds("--rtt", "9" * 400 + "s")


@pytest.mark.parametrize(
    ("bits_per_s", "text"),
    [
        (0.5, "0.5 bit/s"),
        (1, "1 bit/s"),
        (999, "999 bit/s"),
        (1000, "1 kbit/s"),
        (56_000, "56 kbit/s"),
        (100e6, "100 Mbit/s"),
        (123_456_789, "123 Mbit/s"),
        (999.4e6, "999 Mbit/s"),
        (999.6e6, "1 Gbit/s"),
        (2.5e9, "2.5 Gbit/s"),
        (400e9, "400 Gbit/s"),
        (5e12, "5 Tbit/s"),
    ],
)
def test_format_bit_rate(bits_per_s, text):
    assert format_bit_rate(bits_per_s) == text


@given(st.integers(0, 2**53), st.sampled_from([("", 0), ("Ki", 1), ("Mi", 2), ("Gi", 3)]))
def test_whole_numbers_of_bytes_are_exact(number, prefix):
    name, power = prefix
    expected = number * 1024**power
    if expected > 2**60:
        with pytest.raises(ConfigError, match="is more than any machine has"):
            parse_bytes("--x", f"{number}{name}B")
    else:
        assert parse_bytes("--x", f"{number}{name}B") == expected


@given(st.integers(0, 2**59))
def test_bytes_that_are_shown_can_be_typed(count):
    # Three digits are shown, the last one rounded.
    assert abs(parse_bytes("--x", format_bytes(count)) - count) <= count * 0.005 + 0.5


@given(st.floats(1e-3, 9.99e14))
def test_bit_rates_that_are_shown_can_be_typed(bits_per_s):
    again = parse_bit_rate("--x", format_bit_rate(bits_per_s))
    assert again == pytest.approx(bits_per_s, rel=0.0051)


@given(st.floats(0, 1e6), st.sampled_from([("us", 1e-6), ("ms", 1e-3), ("s", 1.0), ("min", 60.0)]))
def test_times_are_scaled_by_their_unit(number, unit):
    name, factor = unit
    text = f"{number:.9f}"
    assert parse_seconds("--x", text + name) == pytest.approx(float(text) * factor, rel=1e-12)


@given(st.text(alphabet="0123456789.kKmMgGiIbBsS/pPuUnNtT -", max_size=12))
def test_any_text_is_a_quantity_or_an_error_of_the_person(text):
    for parse in (parse_bytes, parse_bit_rate, parse_seconds):
        with suppress(ConfigError):
            assert parse("--x", text) >= 0
