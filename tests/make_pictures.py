"""The pictures of the README, taken from a running service: ``UBIQUO_URL=http://127.0.0.1:3000 python tests/make_pictures.py``.

The service is the one that ``make demo`` starts, with its sample journeys and segments.
"""

from __future__ import annotations

import os
import shutil
import uuid

import httpx
from playwright.sync_api import Page, sync_playwright
from scene import ROOT

PICTURES = ROOT / "docs" / "pictures"
WIDTH, HEIGHT = 1280, 800


def shop(page: Page) -> None:
    """A newcomer has looked at three items and put one into the cart."""
    page.goto("/console/shop")
    for place in (1, 4, 2):
        page.get_by_role("button", name="Look at").nth(place).click()
        page.wait_for_timeout(2_000)
    page.get_by_role("button", name="Into the cart").nth(3).click()
    page.wait_for_timeout(2_000)
    page.evaluate("window.scrollTo(0, 0)")


def customer(page: Page) -> None:
    """Somebody who is in the app right now, with a cart."""
    with httpx.Client(base_url=os.environ["UBIQUO_URL"]) as client:
        told = client.post("/v1/churn", json={"identifiers": {"loyalty_card": "1029"}}).json()
        for name, item in (("view_item", "937292"), ("add_to_cart", "1082185")):
            event = {
                "event_id": uuid.uuid4().hex, "name": name, "occurred_at": told["as_of"], "channel": "app",
                "identifiers": {"loyalty_card": "1029"}, "items": [{"item_id": item}],
            }  # fmt: skip
            client.post("/v1/events", json=event).raise_for_status()
    page.goto("/console")
    page.get_by_role("searchbox").fill("1029")
    page.keyboard.press("Enter")
    page.locator(".timeline").wait_for()
    page.locator(".u-wrap").first.wait_for()


def main() -> None:
    """Take them all."""
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_context(
            base_url=os.environ["UBIQUO_URL"], viewport={"width": WIDTH, "height": HEIGHT}, locale="en-GB"
        ).new_page()
        for name, view in {"shop": shop, "customer": customer}.items():
            view(page)
            page.screenshot(path=PICTURES / f"{name}.png")
        page.goto("/console/audiences")
        page.get_by_role("button", name="Count all segments").click()
        page.wait_for_function("[...document.querySelectorAll('td.num')].some(cell => /[0-9]/.test(cell.textContent))", timeout=120_000)
        page.get_by_role("heading", name="The shop's own segments").evaluate("heading => heading.scrollIntoView({block: 'center'})")
        page.screenshot(path=PICTURES / "audiences.png")
        for name, path in {"journeys": "/console/journeys/win-back", "model": "/console/models/churn"}.items():
            page.goto(path)
            page.wait_for_load_state("networkidle")
            page.screenshot(path=PICTURES / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
