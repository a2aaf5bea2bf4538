"""A chat template that would not end, or make more than any chat, is refused after a count that is the same everywhere."""

import pytest

from kdcache.teacher.chat.jinja_template import ChatTemplate
from kdcache.teacher.chat.marked_text import mark

MESSAGES = [{"role": "user", "content": mark("hello", 0)}, {"role": "assistant", "content": mark("yes", 1)}]
MANY = "{% for i in range(99999) %}"
GROW = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = GROWN %}{% endfor %}{{ ns.x }}"

ENDLESS = {
    "loops": f"{MANY}{MANY}{{% endfor %}}{{% endfor %}}",
    "passed over": f"{MANY}{{% for j in range(99999) if false %}}{{% endfor %}}{{% endfor %}}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters": f"{MANY}{{{{ range(9999)|sum }}}}{{% endfor %}}",
    "written": f"{{% set a = 'x' * 10**6 %}}{MANY}{{{{ a }}}}{{% endfor %}}",
    "compared": f"{{% set a = 'x' * 10**7 %}}{MANY}{{% if 'y' in a %}}{{% endif %}}{{% endfor %}}",
    "sliced": f"{{% set a = 'x' * 10**7 %}}{MANY}{{% set b = a[1:] %}}{{% endfor %}}",
    "called": f"{{% set a = 'x' * 10**7 %}}{MANY}{{% set b = a.find('y') %}}{{% endfor %}}",
    "looked into": f"{{% set a = range(9999)|list %}}{MANY}{{% if -1 in a %}}{{% endif %}}{{% endfor %}}",
    "sorted": f"{{% set a = range(9999)|list %}}{MANY}{{% set b = a|sort %}}{{% endfor %}}",
    "namespaces": GROW.replace("GROWN", "namespace(a=ns.x, b=ns.x)"),
}
TOO_LARGE = {
    "times": "{{ 'x' * 10**10 }}",
    "list": "{{ 10**10 * [1] }}",
    "power": "{{ 2 ** (2**20) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "star": "{{ '%*d' % (10**9, 1) }}",
    "braces": "{{ '{:1000000000}'.format(1) }}",
    "nested braces": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "repeated": "{% set a = 'x' * 10**7 %}{{ '{0}{0}'.format(a) }}",
    "center": "{{ 'x'|center(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "tabs": "{{ '\\t'.expandtabs(10**9) }}",
    "indent": "{{ ('a\\n' * 10**5)|indent(10**5) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "wrap": "{{ ('a ' * 10**5)|wordwrap(1, wrapstring='x' * 10**5) }}",
    "json": "{{ range(99999)|list|tojson(indent=10**5) }}",
    "bytes": "{{ 'x'.encode().center(10**9) }}",
    "translate": "{{ ('a' * 10**4).translate({97: 'b' * 10**5}) }}",
    "joined": "{% set a = 'x' * 10**7 %}{{ a.join(range(1000)|map('string')) }}",
    **{
        name: GROW.replace("GROWN", grown)
        for name, grown in {
            "plus": "ns.x + ns.x",
            "tilde": "ns.x ~ ns.x",
            "join": "[ns.x, ns.x]|join",
            "replace": "ns.x.replace('a', ns.x)",
            "nested lists": "[ns.x, ns.x]",
            "nested mappings": "{'a': ns.x, 'b': ns.x}",
            "called mappings": "dict(a=ns.x, b=ns.x)",
        }.items()
    },
}


def refusal(template: str) -> str:
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011: Jinja's own kinds are translated where templates are used
        ChatTemplate(template).render({"messages": MESSAGES})
    return str(caught.value)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_ended(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdcache.teacher.chat.jinja_bounds.MAX_STEPS", 20_000)
    assert "does not end within" in refusal(ENDLESS[name].replace("10**7", "10**6"))


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_larger_than_any_chat_is_refused_before_it_is_made(name: str):
    sentence = refusal(TOO_LARGE[name])
    assert "it makes a" in sentence or "does not end within" in sentence


def test_the_steps_of_a_rendering_grow_with_the_chat():
    template = ChatTemplate(
        "{% for m in messages %}{% for n in messages %}{% if m == n %}{{ m.content }}{% endif %}{% endfor %}{% endfor %}"
    )
    messages = [{"role": "user", "content": mark(f"message {number} " * 20, number)} for number in range(300)]
    assert template.render({"messages": messages}) == "".join(message["content"] for message in messages)


def test_a_template_cannot_tell_that_its_texts_are_marked():
    text = "{{ messages[0].content.origins is defined }} {{ messages[0].content['as_json'] is defined }}"
    assert str.__str__(ChatTemplate(text).render({"messages": MESSAGES})) == "False False"
