"""The page to explore, in a real browser: what a person does with it."""

import csv
import io
import re
import shutil

import numpy as np
import pytest
from scipy import sparse

from ipar_sparse.data.slide import Slide
from ipar_sparse.errors import UserError
from ipar_sparse.evaluation.results import Provenance, SlideEvaluation
from ipar_sparse.report import write_report
from ipar_sparse.report.cells import INFORMATIVE, CellTable, cell_table
from ipar_sparse.report.explorer import MAX_CELLS

CELLS = 240
ATTACK = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script>@{name}\'&'
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def tissue(n=CELLS, genes=80, seed=0):
    """A slide whose genes rise along lines, and labels that follow the first axis."""
    rng = np.random.default_rng(seed)
    pos = rng.uniform(-1, 1, (n, 2)) * [300, 200]
    slopes = rng.normal(size=(2, genes)) / 150 * (np.arange(genes) < 60)
    counts = rng.poisson(np.exp(np.clip(pos @ slopes, -3, 3)))
    labels = np.array([f"zone {ATTACK}", "B", "C"])[np.digitize(pos[:, 0], [-100, 100])]
    names = np.array([f"cell{i}" for i in range(n)], dtype=object)
    names[3] = ATTACK
    return Slide(
        f"slide {ATTACK}",
        sparse.csr_matrix(counts.astype(np.float32)),
        np.array([f"G{i}" for i in range(genes - 1)] + [ATTACK]),
        names.astype(str),
        pos,
        obs={f"zone {ATTACK}": labels, "depth": pos[:, 1]},
    )


def evaluation_of(slide, **changes):
    rng = np.random.default_rng(1)
    fields = {
        "slide": slide.name,
        "pred": slide.pos / 250 @ [[0, 1], [1, 0]] + rng.normal(0, 0.1, slide.pos.shape),
        "true": slide.pos,
        "methods": {
            "model": {"distance_spearman": 0.9},
            ATTACK: {"distance_spearman": 0.8},
            "true coordinates": {"distance_spearman": 1.0},
        },
        "uncertainty": rng.gamma(2, 0.1, slide.num_cells),
        "provenance": Provenance(cautions=[ATTACK], notes=[ATTACK], versions={ATTACK: ATTACK}),
    }
    return SlideEvaluation(**{**fields, **changes})


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of an evaluation and of a prediction."""
    slide, out = tissue(), tmp_path_factory.mktemp("pages")
    cells = cell_table(slide, slide.pos, asked=["G70", ATTACK])
    scored = write_report(out / "scored", evaluation_of(slide), cells=cells, command=ATTACK)
    unscored = evaluation_of(slide, true=None, methods={})
    return scored, write_report(out / "placed", unscored, cells=cells)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium; Debian's is installed by: apt-get install chromium")
    # no GPU is needed: WebGL is computed by SwiftShader
    flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        yield started
        started.close()


class Opened:
    """A page in the browser, what it complained of, and what it asked the network for."""

    def __init__(self, browser, path, **settings):
        settings.setdefault("viewport", {"width": 1200, "height": 1000})
        self.tab = browser.new_page(**settings)
        self.complaints, self.requests = [], []
        self.tab.on("console", self._listen)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(path.as_uri())
        if settings.get("java_script_enabled", True):
            self.tab.wait_for_selector("html[data-explorer=ready]", state="attached")

    def _listen(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def model(self, name, attribute):
        return self.tab.evaluate(f"Bokeh.documents[0].get_model_by_name({name!r}).{attribute}")

    def selected(self):
        return self.model("cells", "selected.indices")

    def spans(self):
        """Width of the tissue that each map shows."""
        return self.tab.evaluate(
            "['map-0', 'map-1'].map((_, i) => Bokeh.documents[0].roots()[i].x_range)"
            ".map((range) => range.end - range.start)"
        )

    def place(self, cell, number=0):
        """Where a drawn cell is on the screen."""
        self.tab.locator(f"#map-{number}").scroll_into_view_if_needed()
        return self.tab.evaluate(
            """([cell, number]) => {
              const plot = Bokeh.documents[0].roots()[number];
              const { frame } = Bokeh.index.find_one(plot);
              const { data } = Bokeh.documents[0].get_model_by_name("cells");
              const box = document.getElementById(`map-${number}`).getBoundingClientRect();
              return [box.x + frame.x_scale.compute(data[`x${number}`][cell]),
                      box.y + frame.y_scale.compute(data[`y${number}`][cell])];
            }""",
            [cell, number],
        )

    def hover(self, cell, number=0):
        x, y = self.place(cell, number)
        self.tab.mouse.move(x - 4, y)
        self.tab.mouse.move(x, y)
        return self.tab.locator(".bk-tooltip-content").first.inner_text(timeout=10_000)

    def download(self, button):
        with self.tab.expect_download() as download:
            self.tab.click(button)
        return download.value.suggested_filename, download.value.path().read_bytes()


@pytest.fixture
def opened(browser, pages):
    open_pages = []

    def open_page(path, **settings):
        page = Opened(browser, path, **settings)
        open_pages.append(page)
        return page

    yield open_page
    for page in open_pages:
        assert page.complaints == []
        assert [
            url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))
        ] == []
        page.tab.close()


def test_a_person_hovers_chooses_a_gene_zooms_and_selects(opened, pages):
    page = opened(pages[0])
    name = page.hover(0).splitlines()[0]
    assert name in set(tissue().cell_names)
    page.tab.select_option("#choice-0", label="G70")
    text = page.hover(1)
    assert "G70: " in text and "ipar_uncertainty: " in text
    assert "coloured by G70" in page.tab.get_attribute("#map-1", "aria-label")
    assert page.model("colors0", "high") == page.model("colors1", "high") > 0
    before = page.spans()
    page.tab.mouse.wheel(0, -400)
    page.tab.wait_for_timeout(300)
    assert page.spans()[0] == page.spans()[1] < 0.9 * before[0]
    page.tab.select_option("#choice-0", label="zone " + ATTACK)
    page.tab.click(".legend button >> nth=1")
    chosen = page.selected()
    column = page.model("cells", "data.color1")
    assert {column[i] for i in chosen} == {1} and len(chosen) < CELLS
    assert f"{len(chosen)} of {CELLS} cells are selected" in page.tab.inner_text("#selected")


def test_cells_selected_on_one_map_are_selected_on_the_other(opened, pages):
    page = opened(pages[0])
    page.tab.locator("#map-0").locator(".bk-tool-icon-box-select").first.click()
    box = page.tab.locator("#map-0").bounding_box()
    x, y, width, height = (box[key] for key in ("x", "y", "width", "height"))
    page.tab.mouse.move(x + 0.1 * width, y + 0.3 * height)
    page.tab.mouse.down()
    page.tab.mouse.move(x + 0.4 * width, y + 0.8 * height, steps=4)
    page.tab.mouse.up()
    page.tab.wait_for_timeout(300)
    chosen = page.selected()
    assert 3 < len(chosen) < CELLS / 2
    for number in (0, 1):
        same = f"data_source.selected.indices.length === {len(chosen)}"
        assert page.model(f"glyphs{number}", same)
    page.tab.click("#clear")
    assert page.selected() == []


def test_downloads_hold_what_is_selected_in_the_order_of_the_file(opened, pages):
    page, slide = opened(pages[0]), tissue()
    name, text = page.download("#save-coordinates")
    rows = list(csv.DictReader(io.StringIO(text.decode())))
    assert name == "coordinates.csv"
    assert [row["cell"] for row in rows] == list(slide.cell_names)
    read = np.array([[float(row[f"measured_{axis}"]) for axis in "xy"] for row in rows])
    np.testing.assert_allclose(read, slide.pos, rtol=1e-5)
    page.tab.select_option("#choice-0", label="zone " + ATTACK)
    page.tab.click(".legend button >> nth=0")
    _, text = page.download("#save-table")
    rows = list(csv.DictReader(io.StringIO(text.decode())))
    zone = "zone " + ATTACK
    expected = [i for i in range(CELLS) if slide.obs[zone][i] == rows[0][zone]]
    assert [row["cell"] for row in rows] == list(slide.cell_names[expected])
    depth = [float(row["depth"]) for row in rows]
    np.testing.assert_allclose(depth, slide.obs["depth"][expected], atol=0.01)
    assert {"G70", "ipar_uncertainty"} <= set(rows[0])
    name, image = page.download("#save-figure")
    assert name == "map.png" and image.startswith(b"\x89PNG") and len(image) > 20_000
    page.tab.click("#scores summary >> nth=0")
    _, text = page.download("button[data-table]")
    assert text.decode().splitlines()[1].startswith("model,0.900")


def test_a_prediction_is_coloured_by_two_columns_at_once(opened, pages):
    page = opened(pages[1])
    label = page.tab.get_attribute
    assert "coloured by zone" in label("#map-0", "aria-label")
    assert "coloured by ipar_uncertainty" in label("#map-1", "aria-label")
    page.tab.select_option("#choice-1", label="G70")
    assert "coloured by zone" in label("#map-0", "aria-label")
    assert "coloured by G70" in label("#map-1", "aria-label")
    _, text = page.download("#save-coordinates")
    assert text.decode().splitlines()[0] == "cell,predicted_x,predicted_y"


def test_names_with_markup_are_text_everywhere(opened, pages):
    for path in pages:
        page = opened(path)
        drawn = int(np.flatnonzero(drawn_names(page) == ATTACK)[0])
        assert ATTACK in page.hover(drawn)
        for choice in page.tab.locator("#explorer select").all():
            choice.select_option(label=ATTACK)
            choice.select_option(label="zone " + ATTACK)
        assert ATTACK in page.tab.inner_text(".legend")
        page.tab.wait_for_timeout(200)
        assert page.tab.evaluate("window.hacked") is None
        assert page.tab.locator("img[src=x]").count() == 0
        page.tab.close()


def drawn_names(page):
    """Names in the order in which cells are drawn, from their downloaded order."""
    _, text = page.download("#save-coordinates")
    names = np.array([row["cell"] for row in csv.DictReader(io.StringIO(text.decode()))])
    stride = page.tab.evaluate(
        "JSON.parse(document.getElementById('explorer-data').textContent).stride"
    )
    return names[np.arange(CELLS) * stride % CELLS]


@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_is_wider_than_the_window(opened, pages, width):
    for path in pages:
        page = opened(path, viewport={"width": width, "height": 900})
        page.tab.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
        if width == 1200:
            scrolls = "[...document.querySelectorAll('.scroll')]"
            hidden = f"{scrolls}.filter((one) => one.scrollWidth > one.clientWidth)"
            assert page.tab.evaluate(f"{hidden}.length") == 0


def test_the_page_is_readable_without_javascript(opened, pages):
    for path in pages:
        page = opened(path, java_script_enabled=False)
        assert not page.tab.locator("#explorer").is_visible()
        pictures = page.tab.locator("#map-figures img").all()
        assert len(pictures) == 2 and all(picture.is_visible() for picture in pictures)
        assert all(picture.get_attribute("alt") for picture in page.tab.locator("img").all())
        for link in page.tab.locator("nav a").all():
            assert page.tab.locator(link.get_attribute("href")).count() == 1


def test_genes_that_tell_places_apart_are_chosen_and_those_asked_for_come_first():
    slide = tissue(400)
    table = cell_table(slide, slide.pos, asked=["G75"])
    assert table.genes[0] == "G75" and table.asked == 1
    assert len(table.genes) == INFORMATIVE + 1
    patterned = [gene for gene in table.genes[1:] if gene != ATTACK and int(gene[1:]) < 60]
    assert len(patterned) >= 45
    np.testing.assert_array_equal(
        table.gene("G75") > 0, slide.expression[:, 75].toarray().ravel() > 0
    )
    with pytest.raises(UserError, match="no gene 'g7' to colour by; did you mean 'G7'"):
        cell_table(slide, slide.pos, asked=["g7"])


def test_of_more_cells_than_a_page_draws_a_sample_is_drawn_and_it_says_so(tmp_path):
    n = MAX_CELLS + 50
    pos = np.random.default_rng(0).uniform(size=(n, 2))
    cells = CellTable(np.arange(n).astype(str), {"few": np.arange(n) % 3 == 0})
    path = write_report(tmp_path, SlideEvaluation("many", pos), cells=cells)
    assert "100,000 of 100,050 cells are drawn, chosen at random" in path.read_text()


@pytest.mark.slow
def test_a_page_of_a_hundred_thousand_cells_and_twenty_genes_has_less_than_ten_megabytes(
    tmp_path, browser
):
    slide = tissue(100_000, 90)
    slide.cell_names = np.char.add(slide.cell_names, np.random.default_rng(0).bytes(8).hex())
    cells = cell_table(slide, slide.pos, asked=[f"G{i}" for i in range(20)])
    path = write_report(tmp_path, evaluation_of(slide), cells=cells)
    assert path.stat().st_size < 10e6
    genes = re.search(r"Genes: (.*?), as asked for", path.read_text()).group(1)
    assert genes == ", ".join(f"G{i}" for i in range(20))
    page = Opened(browser, path)
    page.hover(5)
    assert page.complaints == []
