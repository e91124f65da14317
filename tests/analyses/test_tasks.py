import json
import re

import pytest

from analyses.general_text import GENERAL_TEXT, general_text
from analyses.tasks import (
    Question,
    accuracy,
    chained_sums,
    grade,
    is_file,
    jsonl,
    load,
    read,
    reasoning_gym,
    side_of,
    worked,
)
from surgery.model import Model
from surgery.transcript import Markers
from tests.families import tiny


def expression(question):
    return question.meta["expression"]


def test_train_and_test_never_share_an_expression():
    train = [expression(q) for q in chained_sums(5000, seed=0, side="train")]
    test = [expression(q) for seed in (0, 1) for q in chained_sums(2500, seed=seed, side="test")]
    assert len(train) + len(test) == 10_000
    assert not set(train) & set(test)
    assert {side_of(e) for e in train} == {"train"}
    assert {side_of(e) for e in test} == {"test"}
    known = ["train", "test", "train", "train", "train", "train", "train", "train", "test", "train", "train", "train"]
    assert [side_of(f"{n} + 1") for n in range(12)] == known  # for ever
    assert [side_of("".join(e.split())) for e in train[:99]] == ["train"] * 99  # however it is written
    either = [side_of(expression(q)) for q in chained_sums(2000, seed=0, side="all")]
    assert 0.21 < either.count("test") / 2000 < 0.29


def test_neighbouring_seeds_do_not_repeat_each_other():
    # reasoning-gym's own seeds do: its item i of seed s is item i - 1 of seed s + 1
    a, b = (chained_sums(300, seed=seed, digits=(2, 2)) for seed in (0, 1))
    assert len({q.question for q in a} & {q.question for q in b}) < 5


def test_item_depends_on_seed_and_index_only():
    long, short = chained_sums(50, seed=3), chained_sums(7, seed=3)
    assert long[:7] == short
    assert chained_sums(7, seed=4) != short
    assert [q.meta for q in long[:7]] == [q.meta for q in short]
    assert reasoning_gym("leg_counting", 5, seed=1)[:3] == reasoning_gym("leg_counting", 3, seed=1)


def test_every_partial_result_is_right_and_used():
    for question in chained_sums(500, seed=2):
        total, signed = None, re.findall(r"([-+]?) ?(\d+)", expression(question))
        lines = question.solution.split("\n")
        assert len(lines) == len(signed) - 1
        assert len(lines) in (2, 3)
        for line, (sign, term) in zip(lines, signed[1:], strict=True):
            left, operation, right, result = re.fullmatch(r"(-?\d+) ([-+]) (\d+) = (-?\d+)", line).groups()
            assert int(left) == (int(signed[0][1]) if total is None else total)
            assert (operation, right) == (sign, term)
            total = int(left) + int(operation + right)
            assert int(result) == total
        assert str(total) == question.answer
        assert grade(question, question.answer) is True


def test_terms_and_digits(unchecked):
    sums = chained_sums(40, seed=0, terms=(5, 5), digits=(3, 3))
    assert all(re.fullmatch(r"\d{3}( [-+] \d{3}){4}", expression(q)) for q in sums)
    with pytest.raises(ValueError, match="refused"):
        chained_sums(1, seed=0, terms=(5, 2))
    with pytest.raises(ValueError, match="at least one"):
        chained_sums(0, seed=0)
    with pytest.raises(ValueError, match="side 'dev'"):
        chained_sums(1, seed=0, side="dev")


def test_completion():
    question = Question("2 + 3 - 1 =", "4", "2 + 3 = 5\n5 - 1 = 4")
    assert question.completion() == "<think>\n2 + 3 = 5\n5 - 1 = 4\n</think>\n4"
    assert question.completion(Markers("[", "]")) == "[\n2 + 3 = 5\n5 - 1 = 4\n]\n4"
    assert Question("q", "4").completion() == "4"
    assert Question("q", "4", "").completion() == "<think>\n</think>\n4"


def test_worked_questions_are_a_teachers_answers():
    model, questions = Model(*tiny("llama")), chained_sums(2, seed=1)
    told = worked(model, questions)
    assert [t.question for t in told] == [q.question for q in questions]
    assert [(t.thinking, t.answer) for t in told] == [(q.solution, q.answer) for q in questions]


def test_reasoning_gym_by_name():
    found = reasoning_gym("spell_backward", 4, seed=0, side="test", min_word_len=4)
    assert all(q.answer == q.meta["word"][::-1] for q in found)
    assert all(grade(q, q.answer) for q in found)
    assert {side_of(q.question) for q in found} == {"test"}
    with pytest.raises(ValueError, match="no task 'chain_sums'; close: chain_sum"):
        reasoning_gym("chain_sums", 1, seed=0)
    with pytest.raises(ValueError, match="refused"):
        reasoning_gym("spell_backward", 1, seed=0, letters=3)
    with pytest.raises(ValueError, match="no gold answer"):
        reasoning_gym("rubiks_cube", 1, seed=0)


def test_gym_tasks_with_several_right_answers_use_their_scorer():
    question = reasoning_gym("countdown", 1, seed=0)[0]
    assert grade(question, question.answer) is True
    assert grade(question, f"({question.answer})") is True
    assert grade(question, "1 + 1") is False


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("17", "17", True),
        ("17", "\n17\n", True),
        ("17", "The answer is 17.", True),
        ("17", "17 apples", True),
        ("17", "17.0", True),
        ("17", "18", False),
        ("17", "170", False),
        ("17", "-17", False),
        ("-13", "-13", True),
        ("-13", "\N{MINUS SIGN}13", True),
        ("-13", "17 - 30 = -13", True),
        ("-13", "13", False),
        ("13", "30-13", True),
        ("13", "30 -13", True),
        ("-13", "- 13", True),
        ("17", "12 + 5 = 17", True),
        ("12", "12 + 5 = 17", False),
        ("17", "12 or 17", True),  # the last number is the answer
        ("17", "17 or 12", False),
        ("5", "12 = 7 + 5 apples", True),
        ("1234", "1,234", True),
        ("1,234.5", "$1234.50", True),
        ("18", "$18", True),
        ("-5", "$-5", True),
        ("-5", "-$5", True),
        ("50%", "50", True),
        ("0.5", "1/2", True),
        ("0.5", ".5", True),
        ("3/4", "0.75", True),
        ("3/4", "\\frac{3}{4}", True),
        ("-3/4", "-\\frac{3}{4}", True),
        ("3/4", "6/8", True),
        ("1.5", "1 1/2", True),
        ("1/3", "0.3333", False),
        ("1000", "1e3", True),
        ("6.0", "6", True),
        ("18", "so 3*6\n#### 18", True),
        ("18", "\\boxed{18} because 3 * 6 and 7", True),
        ("18", "\\boxed{\\frac{36}{2}}", True),
        ("18", "\\boxed{3}, no: \\boxed{18}", True),
        ("true", "#### false, no:\n#### true", True),
        ("18", "18, as 3 * 6 = 20 - 2", False),  # the last number counts
        ("6", "\\boxed{2 \\cdot 3}", False),  # and a formula does not, where the gold answer is a number
        ("17", "seventeen", False),
        ("17", "answer17", False),
        ("5", "Route-5", True),
        ("1", "1/0", False),
        ("17", "9" * 5000, False),
        ("B", "B", True),
        ("B", "(B)", True),
        ("B", "b.", True),
        ("B", "B) a cat", True),
        ("B", "The answer is B", True),
        ("B", "A dog is B", False),
        ("B", "not (A) but (B)", True),
        ("B", "C", False),
        ("A", "A dog", False),
        ("A", "The answer is a prime number.", False),
        ("B", "B. The answer is a prime number.", True),
        ("A", "the answer is a", True),
        ("true", "True.", True),
        ("true", "The answer is true", True),
        ("true", "false", False),
        ("answer1", "answer1", True),
        ("answer1", "answer2", False),
        ("x^2+1", "$1 + x^2$", True),
        ("1<x<2", "$(1,2)$", True),  # as the gold answer means it
        ("x^2+1", "1 + x^2", True),
        ("x^2+1", "$x^2$", False),
        ("x^2+1", "1", False),
        ("x^2+1", "a dog", False),
        ("tea", "eat", False),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("17", "", None),
        ("17", "  \n", None),
        ("17", None, None),
    ],
)
def test_grading(gold, text, right):
    assert grade(Question("q", gold), text) is right


def test_exact_reading():
    assert read("0.1", "1") * 3 == read("3/10", "1")
    assert read("no number", "1") is None


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def row(**fields):
    return json.dumps({"question": "How many?", "answer": "3", **fields})


def test_jsonl_reads_numbers_solutions_and_other_keys(tmp_path):
    path = write(
        tmp_path,
        "\ufeff" + row(solution="1 + 2 = <<1+2=3>>3 eggs", level=2),
        "",
        row(answer=3),
        row(answer=6.5),
        row(answer="half of 6 = 3\n#### 3"),
        row(answer=True),
        row(question="line\u2028separator"),
    )
    first, second, third, fourth, fifth, sixth = jsonl(path)
    assert (first.solution, first.meta["level"], first.meta["line"]) == ("1 + 2 = 3 eggs", 2, 1)
    assert (second.answer, second.solution, second.meta["line"]) == ("3", None, 3)
    assert third.answer == "6.5"
    assert (fourth.solution, fourth.answer) == ("half of 6 = 3", "3")
    assert fifth.answer == "true"
    assert sixth.question == "line\u2028separator"
    assert jsonl(path, 2) == [first, second]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{'question': 1}", "not JSON"),
        ("question,answer", "give a line like"),
        ('{"question": "q", "answer": "3"', "not JSON"),
        ("[1, 2]", "JSON object is needed, found list"),
        ('{"question": "q"}', "no 'answer'; keys there: question"),
        ('{"q": "q"}', "no 'question' and no 'answer'"),
        ('{"question": "q", "answer": null}', "no 'answer'"),
        ('{"question": " ", "answer": "3"}', "not blank"),
        ('{"question": 5, "answer": "3"}', "'question' must be text"),
        ('{"question": "q", "answer": [3]}', "text or a number, found list"),
        ('{"question": "q", "answer": NaN}', "not a number"),
        ('{"question": "q", "answer": ""}', "'answer' is blank"),
        ('{"question": "q", "answer": "3", "solution": ["1"]}', "'solution' must be text"),
        (b'{"question": "\xff", "answer": "3"}', "not UTF-8"),
    ],
)
def test_jsonl_names_file_and_line(tmp_path, line, says):
    path = write(tmp_path, row(), "", row(), line, row())
    with pytest.raises(ValueError, match=f"data.jsonl, line 4: .*{re.escape(says)}"):
        jsonl(path)


def test_jsonl_empty_missing_short(tmp_path):
    for lines in ([""], ["", "  ", ""]):
        with pytest.raises(ValueError, match=r"data.jsonl: no questions in it \(empty file\)"):
            jsonl(write(tmp_path, *lines))
    with pytest.raises(FileNotFoundError, match="no such file"):
        jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="5 questions asked for, 2 there"):
        jsonl(write(tmp_path, row(), row()), 5)


def test_jsonl_seed_and_side(tmp_path):
    path = write(tmp_path, *(row(question=f"question {i}") for i in range(60)))
    drawn = jsonl(path, 20, seed=1)
    assert drawn == jsonl(path, 20, seed=1)
    assert drawn != jsonl(path, 20, seed=2)
    assert drawn != jsonl(path, 20)
    assert drawn[:5] == jsonl(path, 5, seed=1)
    train, test = (jsonl(path, side=side) for side in ("train", "test"))
    assert len(train) + len(test) == 60
    assert not {q.question for q in train} & {q.question for q in test}


def test_load_by_word(tmp_path):
    assert load("sums", 5, seed=1, side="test") == chained_sums(5, seed=1, side="test")
    assert len(load("sums", seed=1)) == 200
    assert load("gym:leg_counting", 3, seed=1, side="train") == reasoning_gym("leg_counting", 3, seed=1)
    path = write(tmp_path, row(), row(question="another"))
    assert len(load(str(path))) == 2
    with pytest.raises(ValueError, match="must be 'sums', 'gym:NAME'"):
        load("sum", 5)
    with pytest.raises(FileNotFoundError):
        load("absent.jsonl", 5)


def test_a_file_is_one_whatever_it_is_called(tmp_path, monkeypatch):
    rows = [row(question=f"What is {i}?") for i in range(12)]
    path = write(tmp_path, *rows)
    other = path.rename(tmp_path / "questions.txt")
    assert len(load(str(other))) == 12
    assert is_file(str(other))
    assert is_file("absent.jsonl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums").mkdir()
    assert not is_file("sums")
    assert not is_file("gym:chain_sum")


def test_accuracy_separates_missing_from_wrong():
    questions = [Question(f"q{i}", str(i)) for i in range(10)]
    answers = ["0", "1", "2", "3", "x", "9", None, "", "8", "9"]
    result = accuracy(questions, answers)
    assert (result.right, result.wrong, result.missing, result.n) == (6, 2, 2, 10)
    assert result.answered.value == pytest.approx(6 / 8)
    assert result.overall.value == pytest.approx(6 / 10)
    assert result.answered.method == "wilson"
    assert "2 of 10 missing" in str(result)
    with pytest.raises(ValueError, match="one for each"):
        accuracy(questions, answers[:3])
    with pytest.raises(ValueError, match="no questions"):
        accuracy([], [])


def test_accuracy_refuses_transcripts_of_other_questions():
    from analyses.controls import planted_tokenizer
    from surgery.transcript import read_transcript

    tokenizer = planted_tokenizer()
    ids = tokenizer("<think>\nab\n</think>\n7<end>", add_special_tokens=False)["input_ids"]
    told = read_transcript(tokenizer, "Fabcd", tokenizer("[Fabcd]", add_special_tokens=False)["input_ids"], ids)
    assert accuracy([Question("Fabcd", "7")], [told]).right == 1
    with pytest.raises(ValueError, match="same order"):
        accuracy([Question("Uabcd", "7")], [told])
    unclosed = read_transcript(tokenizer, "q", ids[:1], ids[:3])
    assert accuracy([Question("q", "7")], [unclosed]).missing == 1


def test_general_text():
    assert len(general_text()) == 40 == len(set(GENERAL_TEXT))
    assert all(60 <= len(text.split()) <= 80 for text in GENERAL_TEXT)
    assert general_text(3) == list(GENERAL_TEXT[:3])
    assert not any(re.search(r"\d|think>", text) for text in GENERAL_TEXT)
    with pytest.raises(ValueError, match="there are 40"):
        general_text(41)
