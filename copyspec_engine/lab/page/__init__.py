"""A run as one HTML file that shows where every copied word came from, and what each forward pass did."""

from copyspec_engine.lab.page.html import render_page
from copyspec_engine.lab.page.passes import Decode
from copyspec_engine.lab.page.transcript import transcripts

__all__ = ["Decode", "render_page", "transcripts"]
