import base64
import html.parser
import re

import imageio.v3 as imageio
import numpy as np
import pytest
from browser import PROGRAM, WHY_NOT, Browser
from matplotlib.figure import Figure

from jaxmed.evaluation.pictures import (
    CLASS_COLOURS,
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    figure_to_png,
)
from jaxmed.evaluation.report import write_report
from jaxmed.evaluation.report_parts.cases import picture_limit
from jaxmed.evaluation.report_parts.model_card import KEYS, check_stated
from jaxmed.evaluation.report_parts.slices import make_slices, plain_picture, shrink_picture
from jaxmed.types import UserError

HOSTILE = "a\"><script>alert('x')</script><img src=http://evil/ onerror=alert(1)>&amp;.png"


class Page(html.parser.HTMLParser):
    """What a page holds: its tags, links and words."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.words, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        self.ids += [value for name, value in attrs if name == "id"]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.words.append(data)


def make_report(path, **changes):
    picture = figure_to_png(Figure(figsize=(1, 1)))
    history = [{"step": s, "split": "train", "loss": 1 / (s + 1), "seconds": 1.0} for s in range(9)]
    history += [{"step": s, "split": "val", "dice": 0.1 * s, "loss": 0.5} for s in (3, 6)]
    given = {
        "title": "hippocampus",
        "config": {"seed": 0, "optimizer": {"name": "adamw", "learning_rate": 3e-4}},
        "history": history,
        "summaries": {
            "val": {
                "main_score": "dice",
                "resampled": "patients",
                "metrics": {
                    "dice": {"value": 0.87654, "low": 0.8512, "high": 0.8991, "n": 36},
                    "hd95": {"value": None, "low": None, "high": None, "n": 0},
                },
                "step": 1500,
                "parameters_sha256": "abc123",
            }
        },
        "cases": {
            "best": [{"id": "case_9", "score": 0.95, "picture": picture, "caption": "c"}],
            "worst": [{"id": HOSTILE, "score": 0.1, "picture": picture, "caption": HOSTILE}],
        },
        "curves": [{"picture": picture, "caption": "ROC"}],
        "notes": ["4 boxes were left out."],
    }
    text = write_report(path, **{**given, **changes}).read_text(encoding="utf-8")
    return text, Page(text)


def test_numbers_are_in_the_report(tmp_path):
    text, page = make_report(tmp_path / "new" / "report.html", data="hippocampus")
    words = " ".join(page.words)
    for expected in (
        "Dice 0.877 0.851 to 0.899 36",
        "HD95, mm or pixels – undefined 0",
        "digest of the weights (SHA-256) abc123",
        "optimizer.learning_rate 0.0003",
        "4 boxes were left out.",
        "val dice 6 0.6",
        "train loss 8 0.1111",
        "Dice 0.877 (95 % interval 0.851 to 0.899) on 36 cases of the validation part of "
        "hippocampus, intervals by drawing patients anew.",
    ):
        assert expected in words, expected
    assert text.index("Worst") < text.index("Best")
    assert page.tags.count("img") == 4


def test_report_is_self_contained(tmp_path):
    _, page = make_report(tmp_path / "report.html")
    pictures = [link for link in page.links if link.startswith("data:image/png;base64,")]
    places = [link for link in page.links if link not in pictures]
    assert len(pictures) == 4 and {place[1:] for place in places} <= set(page.ids)
    for link in pictures:
        data = base64.b64decode(link.split(",")[1], validate=True)
        assert data.startswith(b"\x89PNG")
    assert page.tags.count("script") == 1  # its own, told to the browser by digest
    assert not {"link", "iframe", "object"} & set(page.tags)


def test_hostile_text_stays_text(tmp_path):
    text, page = make_hostile(tmp_path / "report.html")
    assert page.tags.count("script") == 1 and text.count("<script") == 1
    assert not [link for link in page.links if "http" in link]
    assert " ".join(page.words).count(HOSTILE) >= 10
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    # Every sign that begins a tag or a link is escaped.
    assert not re.search(r"(?<!\\)<(?!\.?\.?[\w/. ]+>\))", markdown)
    assert markdown.count("alert") >= 10


def make_hostile(path):
    return make_report(
        path,
        title=HOSTILE,
        config={HOSTILE: HOSTILE},
        notes=[HOSTILE],
        warnings=[HOSTILE],
        split={"parts": {HOSTILE: {"cases": 3, "classes": {HOSTILE: 1}}}, "told": [HOSTILE]},
        findings=[{"kind": HOSTILE, "severity": "error", "cases": [HOSTILE] * 9, "advice": "a"}],
        facts={"intended_use": HOSTILE},
        versions={HOSTILE: HOSTILE},
        summaries={
            HOSTILE: {
                "metrics": {HOSTILE: {"value": 0.5, "low": None, "high": None, "n": HOSTILE}},
                "x": HOSTILE,
            }
        },
        curves=[{"picture": "", "caption": HOSTILE}],
        history=[{"step": 1, "split": "$" + HOSTILE, HOSTILE: 1.0}],
    )


def test_report_of_little(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, title="x", config={})
    assert "<h1>x</h1>" in path.read_text()
    picture = tmp_path / "a.png"
    imageio.imwrite(picture, np.zeros((4, 4), np.uint8))
    history = [{"step": 1, "loss": float("nan")}, {"seconds": 3}]
    curves = [{"picture": picture, "caption": "from a file"}]
    write_report(path, title="x", config={}, history=history, curves=curves)
    assert path.read_text().count("data:image/png") == 1
    assert "![from a file](<a.png>)" in (tmp_path / "report.md").read_text()


def test_a_score_without_spread_or_value_is_told(tmp_path):
    entry = {"value": 1.0, "low": None, "high": None, "n": 9, "no_spread": True}
    _, page = make_report(
        tmp_path / "report.html",
        summaries={"test": {"main_score": "accuracy", "metrics": {"accuracy": entry}}},
    )
    words = " ".join(page.words)
    assert "accuracy 1.000 no spread 9" in words
    assert "accuracy 1.000 on 9 cases of the test part" in words


def test_the_page_of_two_hundred_cases_stays_below_15_megabytes(tmp_path):
    rng, many = np.random.default_rng(0), {}
    pixels = rng.integers(0, 256, (700, 900, 3), np.uint8)
    noise = imageio.imwrite("<bytes>", pixels, extension=".png")
    many["worst"] = [
        {"id": f"case {i}", "score": 0.1, "picture": noise, "caption": "noise"} for i in range(200)
    ]
    volume = rng.normal(size=(48, 48, 48, 1)).astype(np.float32)
    limit = picture_limit(200)
    slices = make_slices(volume, mask=volume[..., 0] > 0, alt="noise", limit=limit)
    flat = {"id": "v", "score": 0.1, "told": {}, "pictures": [slices]}
    make_report(tmp_path / "flat.html", cases=many)
    make_report(tmp_path / "volumes.html", cases={"worst": [flat] * 200})
    for name in ("flat.html", "volumes.html"):
        size = (tmp_path / name).stat().st_size
        assert 1e6 < size < 15e6, name


def test_pictures_are_made_smaller_only_where_they_must(tmp_path):
    rng = np.random.default_rng(0)
    data = imageio.imwrite("<bytes>", rng.integers(0, 256, (400, 400), np.uint8), extension=".png")
    assert shrink_picture(data, len(data)) == data
    small = shrink_picture(data, 20_000)
    assert len(small) <= 20_000 and imageio.imread(small).shape[2] == 3
    plain = plain_picture(rng.integers(0, 256, (400, 300, 3), np.uint8), alt="x", limit=30_000)
    assert len(plain.data) <= 30_000


def decode(slices):
    """Slices of a strip as (slice, row, column, 3), without the panel at the left."""
    height, width = slices.size
    strip = imageio.imread(slices.strip).reshape(len(slices.places), height, width, 3)
    return strip[:, :, width // 2 :].astype(int)


def near(pixels, colour):
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.abs(pixels - rgb).max(-1) < 60


def test_slices_show_truth_and_prediction_where_they_are():
    image = np.zeros((40, 40, 9, 1), np.float32)
    truth, mask = np.zeros((2, 40, 40, 9), np.int32)
    truth[5:15, 5:15, 2:4] = 1
    mask[25:35, 5:15, 6] = 1
    slices = make_slices(image, mask=mask, true_mask=truth, spacing=np.ones(3), alt="x")
    assert slices.places == list(range(9)) and slices.depth == 9
    assert slices.start in (2, 3) and slices.label(2) == "slice 3 of 9"
    shown = decode(slices)
    has_truth = near(shown, TRUTH_COLOUR).sum((1, 2)) > 100
    has_mask = near(shown, PREDICTION_COLOUR).sum((1, 2)) > 100
    assert np.flatnonzero(has_truth).tolist() == [2, 3] and np.flatnonzero(has_mask).tolist() == [6]
    # Seen from the feet, front up: the patient's right, small x, is on the left of the picture ...
    half = shown.shape[2] // 2
    left = near(shown[2], TRUTH_COLOUR)[:, :half].sum()
    assert left in (0, near(shown[2], TRUTH_COLOUR).sum())
    # ... and prediction and truth, which are apart in x, on different sides.
    other = near(shown[6], PREDICTION_COLOUR)[:, :half].sum()
    assert (left == 0) != (other == 0)
    assert "truth dashed" in slices.caption


def test_slices_of_several_classes_and_boxes_name_their_colours():
    image = np.zeros((32, 32, 4, 1), np.float32)
    mask = np.zeros((32, 32, 4), np.int32)
    mask[2:12, 2:12], mask[18:30, 18:30] = 1, 2
    slices = make_slices(image, mask=mask, class_names=("background", "head", "tail"), alt="x")
    shown = decode(slices)
    assert near(shown, CLASS_COLOURS[0]).sum() > 100 and near(shown, CLASS_COLOURS[1]).sum() > 100
    assert "head orange, tail light blue" in slices.caption
    boxes = np.array([[4, 4, 1, 20, 24, 3], [np.nan] * 6], np.float32)
    slices = make_slices(image, boxes=boxes, alt="x")
    found = near(decode(slices), PREDICTION_COLOUR).sum((1, 2)) > 100
    assert found.tolist() == [False, True, True, False]


def test_slices_of_long_volumes_keep_their_proportions_and_their_limit():
    image = np.random.default_rng(0).normal(size=(20, 40, 200, 1)).astype(np.float32)
    slices = make_slices(image, spacing=np.array([2, 1, 1]), alt="x", limit=60_000)
    assert len(slices.strip) <= 60_000
    height, width = slices.size
    assert height == width  # 40 mm in either direction, without a second panel
    assert slices.depth == 200 and slices.places == sorted(set(slices.places))
    assert "one in" in slices.caption


def test_the_model_card_marks_what_nobody_told(tmp_path):
    _, page = make_report(tmp_path / "report.html", facts={"intended_use": "to be looked at"})
    words = " ".join(page.words)
    assert "to be looked at" in words and words.count("not stated:") == len(KEYS) - 1
    assert f"{len(KEYS) - 1} of {len(KEYS)} items are not stated" in words
    _, page = make_report(tmp_path / "report.html")
    assert "not stated" not in " ".join(page.words)


@pytest.mark.parametrize(
    "stated, told", [({"intended use": "x"}, "intended_use"), ({"contact": 3}, "must be text")]
)
def test_wrong_statements_are_refused(stated, told):
    with pytest.raises(UserError, match=told):
        check_stated(stated, where="model_card.json")


needs_browser = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium") / "profile") as one:
        yield one


@pytest.fixture
def opened(browser, tmp_path):
    """A report of volumes with hostile names, in the browser."""
    volume = np.random.default_rng(0).normal(size=(24, 30, 12, 1)).astype(np.float32)
    slices = make_slices(volume, mask=(volume[..., 0] > 1) * 1, alt=f"worst case {HOSTILE}")
    case = {"id": HOSTILE, "score": 0.5, "told": {"dice": 0.5}, "pictures": [slices]}
    browser.complaints.clear()
    browser.requests.clear()
    browser.set_screen(1200)
    path = tmp_path / "<script>alert(1)</script>.html".replace("/", "_")
    make_report(
        path,
        title=HOSTILE,
        cases={"worst": [case, case]},
        facts={"intended_use": HOSTILE},
        warnings=[HOSTILE],
    )
    browser.open(path)
    return browser


@needs_browser
def test_the_browser_shows_all_and_complains_of_nothing(opened):
    pictures = opened.run("[...document.images].map(i => [i.naturalWidth, i.alt])")
    assert len(pictures) == 4
    assert all(width > 0 and alt for width, alt in pictures)
    assert opened.run("document.scripts.length") == 1
    assert opened.run("document.title") == HOSTILE
    loaded = [url for url in opened.requests if not url.startswith("data:")]
    assert len(loaded) == 1 and loaded[0].startswith("file:")
    assert opened.complaints == []


@needs_browser
def test_a_complaint_would_be_heard(browser, tmp_path):
    browser.complaints.clear()
    browser.requests.clear()
    page = tmp_path / "bad.html"
    text, _ = make_report(tmp_path / "good.html")
    bad = "<script>console.error('x')</script><img src='http://127.0.0.1:9/x.png'>"
    page.write_text(text.replace("<main>", "<main>" + bad), encoding="utf-8")
    browser.open(page)
    # The page's own rule keeps the script from running and the picture from being loaded.
    assert len(browser.complaints) >= 2
    assert all("Content Security Policy" in told for told in browser.complaints)
    page.write_text("<script>console.error('heard')</script>", encoding="utf-8")
    browser.complaints.clear()
    browser.open(page)
    assert "heard" in str(browser.complaints)


@needs_browser
def test_slices_are_gone_through_with_the_keyboard(opened):
    state = (
        "(() => { const f = document.querySelector('.slices');"
        "return [f.querySelector('input').value, f.querySelector('.which').textContent,"
        "f.querySelector('input').getAttribute('aria-valuetext'),"
        "f.querySelector('img').getBoundingClientRect().top -"
        "f.querySelector('.window').getBoundingClientRect().top,"
        "f.querySelector('.window').getBoundingClientRect().height] })()"
    )
    second = "document.querySelectorAll('.slices')[1].querySelector('.which').textContent"
    before = opened.run(second)
    # Tab alone gets there.
    for _ in range(200):
        opened.press("Tab", 9)
        if opened.run("document.activeElement.type") == "range":
            break
    place, told, spoken, top, height = opened.run(state)
    assert told == spoken == f"slice {int(place) + 1} of 12"
    assert top == pytest.approx(-int(place) * height, abs=1)
    opened.press("Home", 36)
    assert opened.run(state)[:3] == ["0", "slice 1 of 12", "slice 1 of 12"]
    for _ in range(3):
        opened.press("ArrowRight", 39)
    place, told, spoken, top, height = opened.run(state)
    assert (place, told, spoken) == ("3", "slice 4 of 12", "slice 4 of 12")
    assert top == pytest.approx(-3 * height, abs=1)
    assert opened.run(second) == before
    assert opened.complaints == []


@needs_browser
def test_what_a_reader_of_the_screen_needs_is_there(opened):
    levels = opened.run("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert opened.run("document.documentElement.lang") == "en"
    assert opened.run("[...document.querySelectorAll('input')].every(i => i.labels.length)")
    assert opened.run(
        "[...document.querySelectorAll('table')].every(t => t.caption && t.querySelector('th'))"
    )
    links = opened.run(
        "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))"
    )
    assert links


@needs_browser
@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_wider_than_the_screen(opened, width):
    opened.set_screen(width)
    assert opened.run("document.documentElement.scrollWidth") <= width


@needs_browser
def test_on_paper_all_is_unfolded(opened):
    hidden = "[...document.querySelectorAll('details')].filter(d => !d.open).length"
    assert opened.run(hidden) > 0
    opened.run(f"window.seen = []; addEventListener('beforeprint', () => seen.push({hidden}))")
    assert opened.print().startswith(b"%PDF")
    assert opened.run("seen") == [0]
    assert opened.run(hidden) > 0  # and folded again
