"""The kinds of identifiers, from the strongest to the weakest, and the one form in which each value is compared."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import unquote

import phonenumbers
from email_validator import EmailNotValidError, validate_email

IdentifierKind = Literal["loyalty_card", "user_id", "email", "phone", "device", "cookie", "receipt"]
KINDS: tuple[IdentifierKind, ...] = get_args(IdentifierKind)
RANK: dict[str, int] = {kind: rank for rank, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class Rule:
    """What a kind of identifier can prove.

    Attributes:
        names_a_person: it belongs to somebody; the others belong to a thing that several people may use.
        most: how many values of the kind one person may have before what joined them is taken for a shared one.
    """

    names_a_person: bool
    most: int


RULES: dict[str, Rule] = {
    # a retailer gives each person one: two of them are two people, unless an alias says otherwise
    "loyalty_card": Rule(names_a_person=True, most=1),
    "user_id": Rule(names_a_person=True, most=1),
    "email": Rule(names_a_person=True, most=3),
    "phone": Rule(names_a_person=True, most=3),
    # cookies are reset all the time, so having had many proves nothing
    "device": Rule(names_a_person=False, most=100),
    "cookie": Rule(names_a_person=False, most=1_000),
    "receipt": Rule(names_a_person=False, most=10_000),
}
_PLACEHOLDERS = frozenset(
    {
        "", "-", "--", "?", "0", "00000000-0000-0000-0000-000000000000", "n/a", "na", "nan", "nil", "none", "null", "undefined", "unknown",
        "anonymous", "guest", "false", "true", "[object object]", "not set", "(not set)",
    }
)  # fmt: skip
"""What broken clients send in place of an identifier."""
_NOBODYS_MAILBOX = re.compile(
    r"^(test|tests|testing|tester|no-?reply|do-?not-?reply|none|na|unknown|anonymous|nobody|guest|asdf+|x+|a|abc|dummy|fake|email|e-mail|mail)"
    r"(\+[^@]*)?@"
)
"""Addresses that tills, forms and testers type when there is none."""
OF_A_PERSON = re.compile(
    r"(?:^|[._ -])(?:(?:first|last|middle|full|given|family|maiden|sur|user|customer|contact)[._ -]?name|birth|dob|street|address|"
    r"phone|mobile|e[._ -]?mail|post(?:al)?[._ -]?code|zip|passport|ssn|iban|national_id|tax_id)",
    re.IGNORECASE,
)
"""The names of what is true of a person, wherever it is said."""

MAX_IDENTIFIER = 256
"""Characters of an identifier, an id or a name; nothing longer is searched or normalised."""
MAX_ENCODINGS = 8
"""How many times over a text is decoded; what is encoded in more ways than this is taken for an address that hides."""
MAX_DIALLED = 256
"""Characters that look like national phone numbers and are checked in one event; what is beyond them counts as numbers unchecked."""
BLOT = "[blotted out]"
_PERHAPS = re.compile(r"[@%+]|[^\x00-\x7f]")
"""Without one of these there is neither an address nor an international number."""
_ENCODED_PERCENT = re.compile(r"%(?:25)+(?=[0-9a-fA-F]{2})")
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_NO_LOCAL_PART = frozenset(' \t\r\n\f\v\x00\u2028\u2029"<>(),;:[]\\@')
_DOMAIN = re.compile(r"[\w-]++(?:[.\u3002][\w-]++)++|\[[^\]\s@]{1,64}\]")
_BETWEEN = r"[\s().+/_~\[\]\u2010-\u2015\u2212-]"
"""What stands between the digits of a phone number."""
_INTERNATIONAL = re.compile(
    # the date of a build, as in 1.0.0+20180104, is none
    r"\+(?!(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d))" + f"{_BETWEEN}{{0,3}}(?!0)\\d(?:{_BETWEEN}{{0,4}}+\\d){{7,}}+"
)
_DIGITS = re.compile(rf"\(?\d(?:{_BETWEEN}{{0,4}}+\d){{5,}}+")
_GROUP = re.compile(r"\(?\d+\)?")
_LEAST_DIGITS, _MOST_DIGITS = 8, 12
"""Of a number in the form of its country."""
_NO_NUMBER = re.compile(
    r"(?<![\w+(-])(?:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
    r"|\d{8,10}\.\d{8,10}|\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?(?:Z|[+-]\d\d:?\d\d)?)?"
    r"|(?:0?[1-9]|[12]\d|3[01])[./-](?:0?[1-9]|1[0-2])[./-](?:19|20)\d\d)(?!\w|[.-]\w)",
    re.IGNORECASE,
)
"""Ids made by machines (UUIDs, Google's client ids) and dates, within which no phone number is looked for."""


class IdentifierError(ValueError):
    """A value that is no identifier of its kind; the message tells the mend."""


def normalise(kind: IdentifierKind, value: str, region: str | None = None) -> str | None:
    """The form in which *value* is compared, or None where it is a placeholder that identifies nobody.

    E-mail addresses are lower-cased with their domain in ASCII; phone numbers become E.164, read in *region* (ISO 3166) unless
    they carry their country code.

    Raises:
        IdentifierError: no e-mail address, no phone number, or too long for an identifier.
    """
    if len(value) > MAX_IDENTIFIER:
        raise IdentifierError(f"{kind}: an identifier may hold {MAX_IDENTIFIER} characters: send the identifier alone")
    text = value.strip()
    if text.lower() in _PLACEHOLDERS:
        return None
    if kind == "email":
        return _email(text)
    if kind == "phone":
        return _phone(text, region)
    return text


def normalise_all(identifiers: Mapping[IdentifierKind, str], region: str | None = None) -> dict[IdentifierKind, str]:
    """Each identifier in its compared form; placeholders are left out.

    Raises:
        IdentifierError: as ``normalise``; ``kind`` of the error names the culprit.
    """
    found = {}
    for kind, value in identifiers.items():
        form = normalise(kind, value, region)
        if form is not None:
            found[kind] = form
    return found


def _email(text: str) -> str | None:
    try:
        address = validate_email(text, check_deliverability=False, test_environment=True)
    except EmailNotValidError:
        raise IdentifierError("email: not an e-mail address") from None
    plain = (address.ascii_email or address.normalized).lower()
    return None if _NOBODYS_MAILBOX.match(plain) else plain


def _phone(text: str, region: str | None) -> str | None:
    digits = re.sub(r"\D", "", text)
    if digits and (len(set(digits)) == 1 or digits in "01234567890123456789"):
        return None
    try:
        number = phonenumbers.parse(text, region)
    except phonenumbers.NumberParseException:
        mend = "write it with its country code, as +44 20 7946 0958" + ("" if region else ", or set phone_region in the shop")
        raise IdentifierError(f"phone: not a phone number: {mend}") from None
    if not phonenumbers.is_possible_number(number):
        raise IdentifierError("phone: too short or too long for a phone number of its country")
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)


class PersonalSearch:
    """Looks in the texts of one event for what is a person's: e-mail addresses and phone numbers, however encoded.

    Args:
        region: the country (ISO 3166) whose numbers are found without their country code too; None: in international form only.
    """

    def __init__(self, region: str | None = None) -> None:
        self._region = region
        self._left = MAX_DIALLED

    def blotted(self, text: str, most: int) -> str:
        """The text, or its decoded form with every address and number blotted out, cut to *most* characters."""
        plain = _decoded(text)
        if plain is None:
            return BLOT
        rest = _without(plain, _addresses(plain))
        rest = _INTERNATIONAL.sub(BLOT, rest)
        rest = _without(rest, ((start, end) for start, end, _ in self._national(rest)))
        # a blot may be longer than what it hides
        return text if rest == plain else rest[:most]

    def made_plain(self, text: str) -> str:
        """The text if nothing personal is in it, or else in a form in which ``holds_personal`` finds it in whatever country."""
        plain = _decoded(text)
        if plain is None or holds_personal(text):
            return text.lower()
        for start, end, number in reversed(list(self._national(plain))):
            plain = f"{plain[:start]}{number}{plain[end:]}"
        return plain if holds_personal(plain) else text

    def _national(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Where numbers of the region stand, and each in international form."""
        if self._region is None:
            return
        # of equal length, so that places stay places
        text = _NO_NUMBER.sub(lambda found: ";" * len(found[0]), text)
        text = re.sub(r"(?<=\d)\+(?=\d)", " ", text)
        for run in _DIGITS.finditer(text):
            if run[0].isdigit() and not _may_be_dialled(run[0]):
                continue
            self._left -= len(run[0])
            if self._left < 0:
                yield run.start(), run.end(), _unchecked(run[0])
                continue
            # with its neighbours, which the matcher looks at too
            first = max(0, run.start() - 1)
            found = [(first + start, first + end, number) for start, end, number in self._matched(text[first : run.end() + 1])]
            yield from sorted([*found, *self._beside_others(run, found)])

    def _matched(self, text: str) -> Iterator[tuple[int, int, str]]:
        for found in phonenumbers.PhoneNumberMatcher(text, self._region, phonenumbers.Leniency.VALID, max_tries=20):
            if not found.raw_string.isdigit() or _may_be_dialled(found.raw_string):
                yield found.start, found.end, phonenumbers.format_number(found.number, phonenumbers.PhoneNumberFormat.E164)

    def _beside_others(self, run: re.Match[str], known: Sequence[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
        """Numbers that the matcher does not see because other figures stand directly before or after them."""
        groups = [(run.start() + each.start(), run.start() + each.end()) for each in _GROUP.finditer(run[0])]
        groups = [(start, end) for start, end in groups if not any(start < last and first < end for first, last, _ in known)]
        place = 0
        while place < len(groups):
            start = groups[place][0]
            longest = None
            if place == 0 or run.string[start] in "0(":
                for other in range(place, min(place + _MOST_DIGITS, len(groups))):
                    text = run.string[start : groups[other][1]]
                    digits = sum(map(str.isdigit, text))
                    if digits > _MOST_DIGITS:
                        break
                    if digits < _LEAST_DIGITS or (text.isdigit() and not _may_be_dialled(text)):
                        continue
                    # a letter beside it makes it part of something else, such as a hash
                    if run.string[start - 1 : start].isalpha() or run.string[groups[other][1] : groups[other][1] + 1].isalpha():
                        continue
                    self._left -= 1
                    if self._left < 0:
                        yield start, run.end(), _unchecked(run.string[start : run.end()])
                        return
                    if (number := _valid(text, self._region)) is not None:
                        longest = other, number
            if longest is not None:
                yield start, groups[longest[0]][1], longest[1]
                place = longest[0]
            place += 1


def _valid(text: str, region: str | None) -> str | None:
    """The number in international form if the whole text is one."""
    try:
        number = phonenumbers.parse(text, region)
    except phonenumbers.NumberParseException:
        return None
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164) if phonenumbers.is_valid_number(number) else None


def _unchecked(text: str) -> str:
    """What stands for digits that are taken for a phone number without a look at its country's plan."""
    return "+99" + "".join(filter(str.isdecimal, text))


def holds_personal(text: str) -> bool:
    """Whether an e-mail address, or a phone number in international form, stands in the text, however encoded."""
    if not _PERHAPS.search(text):
        return False
    plain = _decoded(text)
    return plain is None or next(_addresses(plain), None) is not None or _INTERNATIONAL.search(plain) is not None


def shortened(text: str, most: int) -> str:
    """The first *most* characters, without a word that the cut goes through if it might be an address: half of one is not found."""
    if len(text) <= most:
        return text
    start = most
    while start and not text[start - 1].isspace():
        start -= 1
    end = text.find(" ", most)
    word = text[start : end if end >= 0 else len(text)]
    return text[:start].rstrip() if "@" in word or "%" in word else text[:most]


def _decoded(text: str) -> str | None:
    """The text as a person would read it: percent-encoding undone, in the plain form of its characters; None if there is no end to it."""
    for _ in range(MAX_ENCODINGS):
        plain = unquote(_ENCODED_PERCENT.sub("%", text)) if "%" in text else text
        if not plain.isascii():
            plain = _INVISIBLE.sub("", unicodedata.normalize("NFKC", plain))
        if plain == text:
            return plain
        text = plain
    return None


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    """Where e-mail addresses stand; each character is looked at once, whatever the text."""
    done, at = 0, text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        if domain is not None:
            start = at
            while start > done and text[start - 1] not in _NO_LOCAL_PART:
                start -= 1
            if start == at and at > done and text[at - 1] == '"':
                start = max(text.rfind('"', done, at - 1), done)
            if start < at:
                yield start, domain.end()
                done = domain.end()
        at = text.find("@", at + 1)


def _without(text: str, places: Iterator[tuple[int, int]]) -> str:
    parts, done = [], 0
    for start, end in places:
        parts += [text[done:start], BLOT]
        done = end
    return "".join([*parts, text[done:]]) if parts else text


def _may_be_dialled(digits: str) -> bool:
    """Whether digits without anything between them may be a phone number rather than an article's (EAN), an order's or a time."""
    if digits.startswith("0"):
        return 9 <= len(digits) <= 12
    return 9 <= len(digits) <= 11 and not (len(digits) == 10 and digits.startswith("1"))


def kind_of(key: str) -> str:
    """The kind of an identity key."""
    return key.partition(":")[0]


def names_a_person(key: str) -> bool:
    """Whether the key is of a kind that belongs to somebody, rather than to a thing."""
    return RULES[kind_of(key)].names_a_person
