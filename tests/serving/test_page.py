"""The page: its files, and what a person does with it in headless Chromium on the real demo."""

import base64
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from patches.selection import num_kept
from serving.page import FOLDER, HEADERS, TYPES, add_page
from tests.pictures import data_url, encoded, noise

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FILES = sorted(path for path in FOLDER.rglob("*") if path.suffix in TYPES)


@pytest.fixture
def files():
    app = FastAPI()
    add_page(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_every_file_is_served_with_its_type_and_a_strict_policy(files):
    for path in FILES:
        name = path.relative_to(FOLDER).as_posix()
        answer = await files.get("/" if name == "index.html" else f"/page/{name}")
        assert answer.status_code == 200
        assert answer.content == path.read_bytes()
        assert answer.headers["content-type"].startswith(TYPES[path.suffix].split(";")[0])
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


async def test_an_unchanged_file_is_not_sent_again(files):
    first = await files.get("/page/page.js")
    again = await files.get("/page/page.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["__init__.py", "../app.py", "..%2fapp.py", "examples/", "nope.js"]
)
async def test_nothing_else_of_the_disk_is_served(files, path):
    assert (await files.get(f"/page/{path}")).status_code == 404


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_page_needs_nothing_from_elsewhere(path):
    if path.suffix == ".png":
        return
    found = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+", path.read_text())
    assert [url for url in found if url != "http://www.w3.org"] == []  # the name of SVG
    assert "style=" not in path.read_text()
    assert "innerHTML" not in path.read_text()


def test_the_examples_are_small_and_all_listed():
    pictures = sorted(path.name for path in (FOLDER / "examples").iterdir())
    listed = re.findall(r'file: "([^"]+)"', (FOLDER / "examples.js").read_text())
    assert sorted(listed) == pictures
    assert sum((FOLDER / "examples" / name).stat().st_size for name in pictures) < 100_000


# In a browser


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    path = path or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, demo_server):
    """Opens the page; at the end nothing may have been blocked, failed or fetched elsewhere."""
    contexts, complaints, urls = [], [], []

    def listen(page):
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if is_bad(said) else None)
        page.on("request", lambda request: urls.append(request.url))

    def is_bad(said):
        is_refusal = "status of 400" in said.text or "status of 401" in said.text
        return said.type in ("error", "warning") and not is_refusal

    def opened(width=1280, height=900, **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.on("page", listen)
        page = context.new_page()
        page.goto(demo_server.url)
        page.wait_for_selector(".panel")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    own = (demo_server.url, "data:", "blob:")
    assert [url[:99] for url in urls if not url.startswith(own)] == []


def drop(page, image, name="dropped.png", event="drop"):
    """What the browser tells a page of a file that is dropped, or pasted."""
    raw = image if isinstance(image, bytes) else encoded(image)
    page.evaluate(
        """([bytes, name, kind]) => {
            const raw = Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([raw], name, { type: "image/png" }));
            const init = { bubbles: true, cancelable: true };
            const event = kind === "drop"
                ? new DragEvent("drop", { ...init, dataTransfer: transfer })
                : new ClipboardEvent("paste", { ...init, clipboardData: transfer });
            document.getElementById("drop").dispatchEvent(event);
        }""",
        [base64.b64encode(raw).decode(), name, event],
    )


def wait_for_answer(page, kept=None, panel=0):
    """Until the panel shows an answer, and nothing is under way."""
    page.wait_for_function(
        """([panel, kept]) => {
            const root = document.querySelectorAll(".panel")[panel];
            const shown = root?.querySelector(".fact strong")?.textContent;
            return shown && !root.hasAttribute("aria-busy") && (kept === null || shown === kept);
        }""",
        arg=[panel, None if kept is None else str(kept)],
        timeout=30_000,
    )


def shown_labels(page, panel=0):
    return page.evaluate(
        """(panel) => Object.fromEntries(
            [...document.querySelectorAll(".panel")[panel].querySelectorAll(".label-field h4")]
                .map((head) => [head.firstChild.textContent, head.lastChild.textContent]))""",
        panel,
    )


def set_ratio(page, ratio, panel=0):
    page.locator('[data-part="ratio"]').nth(panel).fill(str(ratio))


def lit_patches(page, panel=0):
    """Patches of the demo's 8 x 8 grid that are bright on the canvas, for a white image."""
    bytes_ = page.evaluate(
        'async (panel) => document.querySelectorAll("canvas")[panel].toDataURL()', panel
    )
    image = Image.open(io.BytesIO(base64.b64decode(bytes_.split(",")[1]))).convert("L")
    side = image.width / 8
    centres = [((i % 8 + 0.5) * side, (i // 8 + 0.5) * side) for i in range(64)]
    return [i for i, (x, y) in enumerate(centres) if image.getpixel((int(x), int(y))) > 150]


@pytest.mark.browser
@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_dropped_or_pasted_image_is_labelled_as_the_server_labels_it(
    open_page, demo_server, event
):
    page, image = open_page(), noise(3, (112, 112))
    drop(page, image, event=event)
    wait_for_answer(page)
    model = page.locator('[data-part="model"]').input_value()
    answer = demo_server.label(image=data_url(image), model=model)
    assert shown_labels(page) == answer["labels"]
    spoken = page.locator("#announcement").text_content()
    assert all(label in spoken for label in answer["labels"].values())


@pytest.mark.browser
@pytest.mark.parametrize("selector", ["cls", "stride", "random"])
def test_the_slider_lights_exactly_the_kept_patches(open_page, demo_server, selector):
    page = open_page()
    pixels = noise(5, (112, 112)).point(lambda value: 200 + value // 5)  # bright everywhere
    drop(page, pixels)
    page.locator('[data-part="selector"]').select_option(selector)
    wait_for_answer(page)
    for ratio in (0.8, 0.2):
        set_ratio(page, ratio)
        wait_for_answer(page, num_kept(64, ratio))
        body = {"image": data_url(pixels), "retention_ratio": ratio, "selector": selector}
        (told,) = demo_server.label(**body, model="llavac", explain=True)["explanations"]
        assert lit_patches(page) == told["kept"]


@pytest.mark.browser
def test_only_the_last_of_many_moves_is_shown_and_few_are_sent(open_page):
    page, sent = open_page(), []
    drop(page, noise(6, (112, 112)))
    wait_for_answer(page)
    page.on("request", lambda request: sent.append(request.post_data_json))
    for step in range(20):
        set_ratio(page, round(0.95 - 0.04 * step, 2))
    last = round(0.95 - 0.04 * 19, 2)
    wait_for_answer(page, num_kept(64, last))
    page.wait_for_timeout(600)
    wait_for_answer(page, num_kept(64, last))
    assert sent[-1]["retention_ratio"] == last
    assert len(sent) < 10


@pytest.mark.browser
def test_an_old_answer_that_comes_late_is_dropped(open_page):
    page = open_page()
    drop(page, noise(8, (112, 112)))
    wait_for_answer(page)
    # The answer for 0.9 is held back in the page until that for 0.2 is there.
    page.evaluate(
        """() => {
            const real = window.fetch;
            window.fetch = async (path, options) => {
                const { signal, ...rest } = options ?? {};
                const answer = await real(path, rest);
                const isOld = options?.body?.includes('"retention_ratio":0.9');
                if (isOld) await new Promise((resolve) => setTimeout(resolve, 3000));
                if (isOld) window.heldBack = true;
                return answer;
            };
        }"""
    )
    set_ratio(page, 0.9)
    page.wait_for_timeout(400)
    set_ratio(page, 0.2)
    wait_for_answer(page, num_kept(64, 0.2))
    page.wait_for_function("() => window.heldBack")
    page.wait_for_timeout(200)
    wait_for_answer(page, num_kept(64, 0.2))


@pytest.mark.browser
def test_two_ratios_and_two_adapters_stand_side_by_side(open_page):
    page = open_page()
    page.locator("#examples button").first.click()
    wait_for_answer(page)
    page.get_by_label("Compare two").check()
    wait_for_answer(page, num_kept(64, 0.4), panel=1)
    page.locator('[data-part="model"]').nth(1).select_option("sentiment")
    page.wait_for_function(
        "() => document.querySelectorAll('.panel')[1].querySelectorAll('.label-field').length === 1"
    )
    assert set(shown_labels(page, 0)) == {"image", "text", "multimodal"}
    assert set(shown_labels(page, 1)) == {"sentiment"}
    assert len(lit_patches(page, 0)) > 0
    left, right = (page.locator(".panel").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    page.get_by_label("Compare two").uncheck()
    assert page.locator(".panel").count() == 1


@pytest.mark.browser
def test_errors_are_the_servers_words(open_page, demo_server):
    page = open_page()
    drop(page, b"this is no image")
    alert = page.get_by_role("alert")
    alert.wait_for()
    body = {"image": data_url(b"this is no image"), "model": "llavac"}
    said = demo_server.post("/v1/label", body).json()["error"]["message"]
    assert alert.text_content() == said
    drop(page, noise(2))
    wait_for_answer(page)
    assert alert.count() == 0


@pytest.mark.browser
def test_the_attention_map_and_the_dimming_change_the_picture(open_page):
    page = open_page()
    page.locator("#examples button").nth(2).click()
    wait_for_answer(page)
    set_ratio(page, 0.2)
    wait_for_answer(page, num_kept(64, 0.2))
    seen = [page.evaluate("document.querySelector('canvas').toDataURL()")]
    page.get_by_label("Attention map").fill("60")
    seen.append(page.evaluate("document.querySelector('canvas').toDataURL()"))
    page.get_by_label("Dim what is not kept").uncheck()
    seen.append(page.evaluate("document.querySelector('canvas').toDataURL()"))
    assert len(set(seen)) == 3


@pytest.mark.browser
def test_light_and_dark_follow_the_system_and_the_switch(open_page):
    def background(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = (open_page(color_scheme=scheme) for scheme in ("light", "dark"))
    assert background(light) != background(dark)
    day = background(light)
    light.get_by_role("radio", name="Dark").check()
    assert background(light) == background(dark)
    light.reload()
    assert background(light) == background(dark)
    dark.get_by_role("radio", name="Light").check()
    assert background(dark) == day


@pytest.mark.browser
@pytest.mark.parametrize("is_pair", [False, True])
def test_a_phone_of_360_pixels_scrolls_in_one_direction_only(open_page, is_pair):
    page = open_page(360, 780)
    page.locator("#examples button").last.click()
    wait_for_answer(page)
    if is_pair:
        page.get_by_label("Compare two").check()
        wait_for_answer(page, panel=1)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for control in page.locator("button:visible, select:visible, .button:visible").all():
        box = control.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["height"] >= 24


@pytest.mark.browser
def test_every_control_has_a_name_and_the_keyboard_reaches_it(open_page):
    page = open_page()
    names = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")]
            .filter((control) => !control.closest("[hidden]"))
            .map((control) => control.getAttribute("aria-label")
                ?? ([...(control.labels ?? [])].map((label) => label.textContent).join(" ").trim()
                    || control.textContent.trim()))"""
    )
    assert len(names) > 15
    assert all(names)
    page.locator("#text").focus()
    for _ in range(2):  # the button, then the first example
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_for_answer(page, 64)
    page.locator('[data-part="ratio"]').focus()
    for _ in range(60):
        page.keyboard.press("ArrowLeft")
    wait_for_answer(page, num_kept(64, 0.4))
    width = page.evaluate(
        "getComputedStyle(document.querySelector('[data-part=ratio]')).outlineWidth"
    )
    assert width == "3px"


@pytest.mark.browser
def test_a_key_goes_with_requests_and_stays_in_its_tab(open_page):
    page, headers = open_page(), []
    page.get_by_label("API key").fill("secret-of-this-tab")
    page.on("request", lambda request: headers.append(request.headers.get("authorization")))
    page.get_by_label("API key").press("Enter")
    page.wait_for_timeout(300)
    page.locator("#examples button").first.click()
    wait_for_answer(page)
    asked = [header for header in headers if header]
    assert asked
    assert set(asked) == {"Bearer secret-of-this-tab"}
    assert "secret" not in page.locator("#snippet").text_content()
    assert "secret" not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
    other = page.context.new_page()
    other.goto(page.url)
    assert other.get_by_label("API key").input_value() == ""


@pytest.mark.browser
@pytest.mark.parametrize("language", ["curl", "Python"])
def test_the_copied_request_runs_and_answers_the_same(open_page, demo_server, tmp_path, language):
    text = 'it\'s a `great` "$5" day \\o/ é\n\nEOF'
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    image = noise(12, (112, 112))
    name = "it's $mine.png"
    (tmp_path / name).write_bytes(encoded(image))
    drop(page, image, name)
    page.locator("#text").fill(text)
    set_ratio(page, 0.2)
    wait_for_answer(page, num_kept(64, 0.2))
    page.get_by_role("radio", name=language).check()
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    code = page.evaluate("navigator.clipboard.readText()")
    command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    answer = json.loads(ran.stdout) if language == "curl" else evaluated(ran)
    body = {"image": data_url(image), "text": text, "retention_ratio": 0.2, "model": "llavac"}
    assert answer["probabilities"] == demo_server.label(**body)["probabilities"]
    assert answer["retention"]["kept"] == num_kept(64, 0.2)


def evaluated(ran):
    import ast

    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(ran.stdout)
    raise AssertionError(ran.stdout + ran.stderr)


@pytest.mark.browser
def test_text_alone_is_labelled_and_an_empty_page_asks_nothing(open_page):
    page, sent = open_page(), []
    page.on("request", lambda request: sent.append(request.url))
    page.wait_for_timeout(400)
    assert [url for url in sent if url.endswith("/v1/label")] == []
    page.locator("#text").fill("what a wonderful day")
    wait_for_answer(page, 0)
    assert page.locator("canvas").is_hidden()


def test_the_policy_allows_what_the_page_does_and_no_more():
    assert "'unsafe-inline'" not in HEADERS["Content-Security-Policy"]
    assert "script-src 'self';" in HEADERS["Content-Security-Policy"]


@pytest.mark.browser
def test_a_server_that_refuses_at_first_is_quoted_and_asked_again_with_a_key(open_page):
    """Only the refusal is made up: this server knows no keys."""
    message = "a key is needed: send it as Authorization: Bearer KEY"

    def guarded(route):
        if "authorization" in route.request.headers:
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": message, "code": "no_key"}})

    page = open_page()
    page.route("**/v1/**", guarded)
    page.reload()
    page.wait_for_selector("#server.failed")
    assert page.locator("#server").text_content() == message
    assert page.locator(".panel").count() == 0
    page.get_by_label("API key").fill("anything")
    page.get_by_label("API key").press("Enter")
    page.wait_for_selector(".panel")
    page.locator("#examples button").first.click()
    wait_for_answer(page)
