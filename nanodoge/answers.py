r"""Whether an answer is the one that is wanted: equal numbers, however they are written, else equal texts.

People and models write one number in many ways. A row of SPELLINGS turns a way of writing into the one that NUMBER
reads; what NUMBER does not read is no number.

    7.  7.0  +7  007  x = 7  $7$  **7**  \(7\)  `7`  \boxed{7}      7: wrappers are stripped, also of texts
    −7 (U+2212)  –7 (en dash)  -$7  $-7                           -7
    1,000  1{,}000  1\,000  $1,000.00  1,000 €  1000 USD          1000; a comma stands before three digits only
    1/2  \frac{1}{2}  \frac12  0.5  .5                           a half;  2 1/2 is 2.5
    1e3  10^3  10^{3}  2×10^3  2 \cdot 10^3                       1000, 2000; at most three digits of exponent
    3 dozen  2 million                                            36, 2000000
    50%  50\%  50 percent      equal to 50, since the question may ask for percent, and to 0.5; 50% is not 0.5%
    5 apples  5 \text{ cm}  90^\circ  5km      5: a unit is words after a blank, or one of SHORT, and counts where both
                                               have one: 5 km is not 5 m
    5x  5\pi  \sqrt{2}  3:30  1,5  5 or 6  1/0  -     no numbers: compared as texts
"""

import re
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

WRAPPERS = [("**", "**"), ("*", "*"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("`", "`"), ("\\text{", "}")]
SPELLINGS = {
    r"[−–]": "-",
    r"\\[dt]?frac ?\{(-?\d+)\} ?\{(\d+)\}": r"\1/\2",
    r"\\[dt]?frac ?(\d)(\d)": r"\1/\2",
    r"\\(?:text|textbf|mathrm|mbox) ?\{([^{}]*)\}": r" \1 ",
    r"\{,\}": ",",
    r"\\[,!;: ]": "",
    r"\\([$%])": r"\1",
    r"\\times|\\cdot|[×·]": "*",
    r"\^\{(-?\d+)\}": r"^\1",
    r"\^ ?\{? ?\\circ ?\}?|°": " degrees",
    r"^([-+]?)10\^": r"\g<1>1*10^",
}
SCALES = dict(hundred=10**2, thousand=10**3, million=10**6, billion=10**9, trillion=10**12, dozen=12)
SHORT = "mm cm m km mg g kg ml l s h min am pm".split()
NO_UNITS = "pi sqrt sin cos tan log ln exp or and to over of minus plus times".split()
NUMBER = re.compile(
    r"""([A-Za-z]\s?=\s?)?
    (?P<sign>[-+]?)\s?[$€£¥₹]?\s?(?P<second_sign>[-+]?)
    ((?P<whole>\d+)\s(?=\d+/))?
    (?P<digits>\d{1,3}(,\d{3})+|\d*)(?P<decimals>\.\d*)?
    (\s?/\s?(?P<divisor>\d{1,18}))?
    ([eE](?P<e>[-+]?\d{1,3})|\s?\*\s?10\^(?P<power>[-+]?\d{1,3}))?
    (\s?(?P<percent>%|percent))?
    (\s?[€£¥₹])?
    (?P<unit>\s?[A-Za-z][A-Za-z\s./^23]*)?""",
    re.VERBOSE | re.ASCII,
)


class Number(NamedTuple):
    value: Fraction
    is_percent: bool = False
    unit: str = ""


def final_answer(text: str) -> str:
    """What an answer comes to: the text between the solution tags, else all of it; of that what stands after the last
    ####, and of that what stands in the last \\boxed{}. "" for a solution that does not end."""
    if "<|begin_of_solution|>" in text:
        ended, _, _ = text.rpartition("<|end_of_solution|>")  # "" if no solution ends
        _, is_begun, solution = ended.rpartition("<|begin_of_solution|>")
        text = solution.partition("<|end_of_solution|>")[0] if is_begun else ""
    text = text.rpartition("####")[2]
    _, is_boxed, boxed = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(boxed if is_boxed else ""):
        depth += (character == "{") - (character == "}")
        if not depth:
            return boxed[:i].strip()
    return text.strip()


def unwrap(text: str) -> str:
    """A text without the signs around it, such as $ and **, and without a full stop at its end."""
    for _ in range(8):  # at most 8 nested wrappers
        text = text.strip().removesuffix(".")
        for begin, end in WRAPPERS:
            if len(text) > len(begin + end) and text.startswith(begin) and text.endswith(end):
                text = text[len(begin) : -len(end)]
    return text.strip()


def number(text: str) -> Number | None:
    """The number that a text is, None if it is none or has 10,000 characters: the time grows with their square."""
    text = " ".join(unwrap(text).split())
    for pattern, spelling in SPELLINGS.items():
        text = re.sub(pattern, spelling, text)
    found = NUMBER.fullmatch(" ".join(text.split()))
    if len(text) > 10_000 or not found or not re.search("[0-9]", found["digits"] + (found["decimals"] or "")):
        return None
    written = found["unit"] or ""
    scale, *unit = written.lower().split() or [""]
    unit = unit if scale in SCALES else [scale] * bool(scale) + unit
    are_units = [word in SHORT or (len(word) > 1 and word not in NO_UNITS) for word in unit]
    are_units += [written[0] == " " or unit[0] in SHORT] if unit else []
    divisor = int(found["divisor"] or 1)
    if not all(are_units) or not divisor or (found["sign"] and found["second_sign"]):
        return None
    value = Fraction(Decimal((found["digits"] or "0").replace(",", "") + (found["decimals"] or ""))) / divisor
    value = (value + Fraction(Decimal(found["whole"] or 0))) * SCALES.get(scale, 1)
    value *= Fraction(10) ** int(found["e"] or found["power"] or 0)
    is_negative = "-" in (found["sign"], found["second_sign"])
    return Number(-value if is_negative else value, bool(found["percent"]), " ".join(unit).rstrip("s"))


def is_right(text: str, wanted: str) -> bool:
    """Whether what an answer comes to (see final_answer) is what is wanted."""
    found = final_answer(text)
    a, b = number(found), number(wanted)
    if a is None or b is None:
        return found != "" and unwrap(found) == unwrap(wanted)
    hundredth = Fraction(1, 100) ** (a.is_percent - b.is_percent)  # 1 if both or none are percentages
    return b.value in (a.value, a.value * hundredth) and (a.unit == b.unit or not (a.unit and b.unit))
