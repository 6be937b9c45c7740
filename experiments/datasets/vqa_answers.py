"""Answers to questions of VQA v2: their normal form, the official accuracy, the vocabulary.

Ten people answer a question. With m of the other nine giving the same answer, an answer is worth
min(1, m / 3) against one of them; its accuracy is the mean over all ten. So an answer that n of ten
gave is worth 0, .3, .6, .9 for n = 0, 1, 2, 3 and 1 from there.

Source: Antol et al., "VQA: Visual Question Answering", 2015, §3.1, and the evaluation code at
visualqa.org, whose slips are kept, since published scores contain them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

PEOPLE = 10
COMMON = 9  # a vocabulary keeps answers of as many questions or more
WORTH = (0.0, 0.3, 0.6, 0.9, *[1.0] * 7)  # of an answer that n of ten gave

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"zero": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = ("a", "an", "the")
# Of these, those written with one apostrophe too few are given it back.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""


def _restored() -> dict[str, str]:
    restored = {"somebody'd": "somebodyd"}  # the official list has this one the other way round
    for word in CONTRACTIONS.split():
        for match in re.finditer("'", word):
            restored[word[: match.start()] + word[match.end() :]] = word
    return restored


RESTORED = _restored()


@cache
def normalised(answer: str) -> str:
    """Lower case, without punctuation and articles, numbers up to ten as digits."""
    return _words(_without_punctuation(_stripped(answer)))


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """A mark becomes a space, or nothing where it stands beside one or commas group digits."""
    grouped, found = re.search(r"\d,\d", text), text
    for mark in PUNCTUATION:
        beside = mark + " " in text or " " + mark in text
        found = found.replace(mark, "" if beside or grouped else " ")
    return re.sub(r"\.(?!\d)", "", found, count=32)


def _words(text: str) -> str:
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """The official accuracy, 0 … 1, of an answer to one question that people have answered.

    Where all of them gave the very same answer, nothing is normalised.

    Raises:
      ValueError: there are not ten answers.
    """
    if len(answers) != PEOPLE:
        raise ValueError(f"{len(answers)} answers to a question; expected {PEOPLE}")
    answer, answers = _stripped(answer), [_stripped(one) for one in answers]
    if len(set(answers)) > 1:
        answer, answers = normalised(answer), [normalised(one) for one in answers]
    return WORTH[answers.count(answer)]


# --- vocabulary and targets --------------------------------------------------------------------


def vocabulary(answers: Iterable[str], common: int = COMMON) -> tuple[str, ...]:
    """Normalised, of the answers that most people gave to each question, those of `common` or more
    questions, the most frequent first."""
    counts = Counter(map(normalised, answers))
    kept = [answer for answer, count in counts.items() if count >= common]
    return tuple(sorted(kept, key=lambda answer: (-counts[answer], answer)))


def votes(answers: Sequence[str], numbers: Mapping[str, int]) -> dict[int, int]:
    """{number in the vocabulary: n}, for every answer that ten people gave and that is worth
    something; n is how many gave it, and `WORTH[n]` its official accuracy."""
    answers = [_stripped(one) for one in answers]
    counts = Counter(answers)
    if len(counts) > 1:
        counts = Counter(map(normalised, answers))
    return {numbers[answer]: n for answer, n in counts.items() if answer in numbers}
