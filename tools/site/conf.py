"""Sphinx's configuration of the documentation site; `python tools/docs.py` runs it."""

from kdcache import __version__

project = "kdcache"
copyright = "the kdcache maintainers"
version = release = __version__

extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["deflist", "fieldlist", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a README may begin its sub-sections at ###
nitpicky = False
default_role = "code"
highlight_language = "none"  # of a block that does not say: a diagram, a listing
toc_object_entries = False
python_maximum_signature_line_length = 90

html_theme = "pydata_sphinx_theme"
html_title = "kdcache"
html_static_path = ["static"]
html_css_files = ["kdcache.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": []}
html_theme_options = {
    "logo": {"text": "kdcache"},
    "header_links_before_dropdown": 5,
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "show_nav_level": 2,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_exclude = ".linenos, .gp, .go"

pygments_style = "default"
html_last_updated_fmt = None
