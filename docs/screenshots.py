"""Makes the screenshots of docs/demo.md. `python docs/screenshots.py MODEL OTHER`: two models, side by side.

Needs what the page's tests need: Chromium, and onnxruntime-web in the user's cache (`slimsam demo --install`).
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import chromium, demo_page  # noqa: E402
from helpers.demo_serving import serving  # noqa: E402
from slimsam_jax.demo import __main__ as demo  # noqa: E402
from slimsam_jax.demo import export, server  # noqa: E402

IMAGES = ROOT / "docs" / "images"
MOST_BYTES = 150_000
WINDOW = 1000, 1060
PHONE = 360, 760


def look(tab: chromium.Page, size: tuple[int, int], scheme: str) -> None:
    """Gives the page a size in pixels, and a scheme, dark or light."""
    width, height = size
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


def write(name: str, content: bytes) -> None:
    if len(content) > MOST_BYTES:
        raise SystemExit(f"{name}: {len(content)} bytes, and a page should not have more than {MOST_BYTES}")
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / name).write_bytes(content)
    print(f"{name}: {len(content) / 1000:.0f} kB")


def shoot(tab: chromium.Page, name: str) -> None:
    """Writes what the window shows, from its top."""
    tab.evaluate("scrollTo(0, 0)")
    write(name, base64.b64decode(tab.call("Page.captureScreenshot", format="jpeg", quality=75)["data"]))


def click(tab: chromium.Page, photo: str, *points: tuple[float, float]) -> None:
    """Clicks on a photograph, and waits for the masks; the last point is background if there are several."""
    demo_page.choose(tab, photo)
    places, _ = demo_page.on_screen(tab, *points)
    for i, place in enumerate(places):
        tab.drag(place, shift=0 < i == len(places) - 1)
        demo_page.masks(tab)


def shots(tab: chromium.Page, other: str) -> None:
    """Makes all of them; `other` is the second model's name."""
    look(tab, WINDOW, "light")
    click(tab, "sunflower.jpg", (257, 272))
    shoot(tab, "demo_click.jpg")
    demo_page.press(tab, "#share")
    card = tab.evaluate("document.getElementById('card').toDataURL('image/jpeg', 0.85)")
    write("demo_card.jpg", base64.b64decode(card.partition(",")[2]))
    demo_page.press(tab, "#close")

    demo_page.turn(tab, other)
    look(tab, WINDOW, "dark")
    demo_page.choose(tab, "fish.jpg")
    tab.evaluate("document.getElementById('side').value = 8")
    demo_page.press(tab, "#everything")
    tab.wait_for(demo_page.SETTLED, timeout=600)
    shoot(tab, "demo_everything.jpg")
    look(tab, PHONE, "dark")
    click(tab, "cocktail.jpg", (256, 310))
    shoot(tab, "demo_phone.jpg")


def main(models: list[Path]) -> None:
    if len(models) != 2 or len({path.name for path in models}) != 2:
        raise SystemExit("give two models, folders or files of different names")
    cache = demo.default_cache()
    runtime, prepared = demo.find_runtime(cache), export.prepare(tuple(models), "float32", cache)
    pages = serving(server.page_files(prepared, runtime, threads=1))
    with tempfile.TemporaryDirectory() as profile, chromium.page(Path(profile)) as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{pages.server_port}/")
        tab.wait_for(demo_page.SETTLED)
        shots(tab, models[1].name)
    pages.shutdown()


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
