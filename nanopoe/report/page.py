"""The report as one HTML page that needs nothing else: pictures inside, no script, nothing from the network.

Every text goes through the template's escaping, since a run's name, a prompt or a model's answer may be anything.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from jinja2 import Environment, StrictUndefined

from nanopoe.report.document import Chapter

STYLE = """
:root { --ink: #1c2024; --dim: #5f6b76; --line: #dfe3e8; --paper: #ffffff; --card: #f5f7f9; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --dim: #9aa5b1; --line: #343b43; --paper: #15181c; --card: #1e2329; --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink); background: var(--paper);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; color: var(--dim); max-width: 50rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; }
a { color: var(--accent); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.figures span { display: block; color: var(--dim); font-size: .8rem; }
.figures b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--dim); font-weight: 600; }
.numbers th, .numbers td { white-space: nowrap; }
.numbers th + th, .numbers td + td { text-align: right; }
.texts td { min-width: 9rem; max-width: 24rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.texts td:first-child { min-width: 5rem; font-weight: 600; }
img { display: block; width: 100%; height: auto; margin: .75rem 0; border-radius: .5rem; background: #ffffff; }
details { margin: .5rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; overflow-x: auto;
      font-size: .8rem; }
"""

TEMPLATE = """\
{% macro table(t) -%}
<div class="wide"><table class="{{ 'numbers' if t.numbers else 'texts' }}">
<thead><tr>{% for cell in t.head %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in t.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ chapters[0].title }}</title>
<style>{{ style|safe }}</style>
</head>
<body>
{% for chapter in chapters %}{% set c = loop.index %}
<h1 id="c{{ c }}">{{ chapter.title }}</h1>
{% if chapter.text %}<p>{{ chapter.text }}</p>{% endif %}
{% if chapter.figures %}<div class="figures">
{% for what, figure, note in chapter.figures %}
<div><span>{{ what }}</span><b>{{ figure }}</b><span>{{ note }}</span></div>
{% endfor %}</div>{% endif %}
<nav>{% for section in chapter.sections %}<a href="#c{{ c }}s{{ loop.index }}">{{ section.title }}</a>
{% endfor %}{% if loop.first %}{% for other in chapters[1:] %}<a href="#c{{ loop.index + 1 }}">{{ other.title }}</a>
{% endfor %}{% endif %}</nav>
{% for section in chapter.sections %}
<h2 id="c{{ c }}s{{ loop.index }}">{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% for name in section.pictures %}
<img alt="{{ section.title }}: {{ name }}" src="data:image/png;base64,{{ images[name] }}">
{% endfor %}
{% for t in section.tables %}{% if t.folded %}<details><summary>{{ t.title }}</summary>
{% if t.note %}<p>{{ t.note }}</p>{% endif %}{{ table(t) }}</details>
{% else %}<h3>{{ t.title }}</h3>
{% if t.note %}<p>{{ t.note }}</p>{% endif %}{{ table(t) }}
{% endif %}{% endfor %}
{% if section.code %}<details><summary>all keys</summary><pre>{{ section.code }}</pre></details>{% endif %}
{% endfor %}
{% endfor %}
</body>
</html>
"""


def html(chapters: Sequence[Chapter], images: Mapping[str, bytes]) -> str:
    """The page of `chapters`, of which there is one at least; `images` are the PNG files by the names in them."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              keep_trailing_newline=True)
    embedded = {name: base64.b64encode(data).decode() for name, data in images.items()}
    return environment.from_string(TEMPLATE).render(chapters=chapters, images=embedded, style=STYLE)
