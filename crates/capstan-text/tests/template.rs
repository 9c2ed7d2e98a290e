//! Templates in the dialects that models bring, hostile ones, and hostile messages.
use capstan_text::{ChatTemplate, TextError};
use serde_json::json;

const TODAY: &str = "2026-03-07";

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(Some(source), "<s>", "</s>").unwrap()
}

fn render(source: &str, messages: serde_json::Value) -> Result<String, TextError> {
    template(source).render(&messages.to_string(), None, None, true, TODAY)
}

fn hello() -> serde_json::Value {
    json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>"}])
}

#[test]
fn chatml_is_the_default() {
    for source in [None, Some(""), Some(" \n")] {
        let chat = ChatTemplate::new(source, "", "").unwrap();
        let text = chat.render(&hello().to_string(), None, None, true, TODAY).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"
        );
        let closed = chat.render(&hello().to_string(), None, None, false, TODAY).unwrap();
        assert!(closed.ends_with("Hi <b><|im_end|>\n"));
    }
}

#[test]
fn a_llama_like_template_with_a_date_and_block_whitespace() {
    let source = "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = strftime_now(\"%d %b %Y\") %}\n{%- endif %}\n\
        {% for m in messages %}\n    {% if m['role'] == 'tool' %}\n        {% continue %}\n    {% endif %}\n[{{ m.role }}]{{ m['content'] | trim }}{{ eos_token }}\n\
        {% endfor %}\n{% if add_generation_prompt %}\n[assistant] {{ date_string }}\n{% endif %}";
    let text = render(source, hello()).unwrap();
    assert_eq!(text, "<s>[system]Be brief.</s>\n[user]Hi <b></s>\n[assistant] 07 Mar 2026\n");
    let chat = template(source);
    let text = chat.render(&hello().to_string(), None, Some(r#"{"date_string": "today"}"#), true, TODAY).unwrap();
    assert!(text.ends_with("[assistant] today\n"));
}

#[test]
fn a_template_that_begins_with_its_own_system_message() {
    let source = "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|system\nYou are small.|>' }}{% endif %}\
        {{ '<|' + m['role'] + '\n' + m['content'] + '|>' }}{% endfor %}";
    assert_eq!(
        render(source, json!([{"role": "user", "content": "a"}])).unwrap(),
        "<|system\nYou are small.|><|user\na|>"
    );
    assert_eq!(render(source, hello()).unwrap(), "<|system\nBe brief.|><|user\nHi <b>|>");
}

#[test]
fn a_qwen_like_template_with_tools_and_calls() {
    let source = "{%- if tools %}{{- '# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}{%- endif %}\
        {%- set ns = namespace(last=-1) %}\
        {%- for message in messages[::-1] %}{%- if ns.last < 0 and message.role == 'user' and not (message.content.startswith('<tool') and message.content.endswith('>')) %}\
        {%- set ns.last = (messages|length - 1) - loop.index0 %}{%- endif %}{%- endfor %}\
        {%- for message in messages %}{%- if message.tool_calls %}{%- for call in message.tool_calls %}{%- set call = call.function if call.function else call %}\
        {{- '<tool_call>' }}{{- call.name }} {{ call.arguments | tojson }}{{- '</tool_call>' }}{%- endfor %}\
        {%- else %}{{- message.role + ':' + message.content + '\\n' }}{%- endif %}{%- endfor %}\
        {{- ns.last }}{%- if enable_thinking is defined and enable_thinking is false %}{{- ' nothink' }}{%- endif %}";
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Köln\", \"days\": 2}"}}
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
    ]);
    let tools =
        json!([{"type": "function", "function": {"name": "weather", "parameters": {"b": 1.5, "a": ["x", "<&'>"]}}}]);
    let chat = template(source);
    let text = chat
        .render(&messages.to_string(), Some(&tools.to_string()), Some(r#"{"enable_thinking": false}"#), true, TODAY)
        .unwrap();
    assert_eq!(
        text,
        "# Tools\n{\"type\": \"function\", \"function\": {\"name\": \"weather\", \"parameters\": {\"b\": 1.5, \"a\": [\"x\", \"<&'>\"]}}}\n\
         user:Weather?\n<tool_call>weather {\"city\": \"Köln\", \"days\": 2}</tool_call>tool:sun\n0 nothink"
    );
}

#[test]
fn templates_that_concatenate_arguments_get_strings() {
    let source = "{% for m in messages %}{{ m.role + ':' + m.content }}{% for c in m.tool_calls %}{{ '!' + c.function.arguments }}{% endfor %}{% endfor %}";
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{\"b\":1}"}}]}]);
    assert_eq!(render(source, messages).unwrap(), "user:aassistant:!{\"b\":1}");
}

#[test]
fn tojson_is_pythons() {
    let source = "{{ messages[0].content }}{{ x | tojson }}|{{ x | tojson(indent=2) }}|{{ x | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}";
    let kwargs = r#"{"x": {"b": [1, 2.0, true, null], "a": {}, "é😀": "\u0001\"\n/", "l": []}}"#;
    let text = template(source).render(r#"[{"role":"user","content":"-"}]"#, None, Some(kwargs), true, TODAY).unwrap();
    let flat = r#"{"b": [1, 2.0, true, null], "a": {}, "é😀": "\u0001\"\n/", "l": []}"#;
    let pretty = "{\n  \"b\": [\n    1,\n    2.0,\n    true,\n    null\n  ],\n  \"a\": {},\n  \"é😀\": \"\\u0001\\\"\\n/\",\n  \"l\": []\n}";
    let ascii = r#"{"a":{},"b":[1,2.0,true,null],"l":[],"\u00e9\ud83d\ude00":"\u0001\"\n/"}"#;
    assert_eq!(text, format!("-{flat}|{pretty}|{ascii}"));
}

#[test]
fn content_parts_go_where_the_template_takes_them() {
    let parts =
        json!([{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]);
    let strings_only = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}";
    assert_eq!(render(strings_only, parts.clone()).unwrap(), "[one\ntwo]");
    let both = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}<{{ p['text'] }}>{% endfor %}{% endif %}{% endfor %}";
    assert_eq!(render(both, parts.clone()).unwrap(), "<one><two>");
    assert_eq!(render(both, json!([{"role": "user", "content": "x"}])).unwrap(), "x");
    let parts_only = "{% for m in messages %}{% for p in m.content %}<{{ p['text'] }}>{% endfor %}{% endfor %}";
    assert_eq!(render(parts_only, json!([{"role": "user", "content": "x"}])).unwrap(), "<x>");
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]);
    let error = render(both, image).unwrap_err();
    assert!(matches!(&error, TextError::Request(m) if m.contains("image_url") && m.contains("text only")), "{error}");
}

#[test]
fn pythons_methods_on_strings() {
    let source = "{{ '{:>3}|{{}}|{}'.format('x', 'yy') }} {{ 'abc'.replace('b', 'xx') }} {{ ', '.join(['a', 'b']) }} \
        {{ 'abc'.removeprefix('a').removesuffix('c') }} {{ ' a '.strip() }} {{ 'a,b'.split(',')[-1] }}";
    assert_eq!(render(source, hello()).unwrap(), "  x|{}|yy axxc a, b b a b");
}

#[test]
fn developer_is_system_where_the_template_knows_no_developer() {
    let messages = json!([{"role": "developer", "content": "a"}]);
    assert_eq!(render("{% for m in messages %}{{ m.role }}{% endfor %}", messages.clone()).unwrap(), "system");
    let knows = "{% for m in messages %}{{ 'D' if m.role == 'developer' else m.role }}{% endfor %}";
    assert_eq!(render(knows, messages).unwrap(), "D");
}

#[test]
fn generation_tags_are_conditions() {
    let source =
        "{% for m in messages %}\n  {%- generation -%}\n {{ m.content }}\n {%- endgeneration -%}\n{% endfor %}";
    assert_eq!(render(source, json!([{"role": "user", "content": "x"}])).unwrap(), "x");
}

#[test]
fn a_refusal_carries_the_templates_words() {
    let error = render("{{ raise_exception('Roles must alternate') }}", hello()).unwrap_err();
    assert_eq!(error, TextError::Refused("Roles must alternate".into()));
    assert!(matches!(ChatTemplate::new(Some("{% if %}"), "", ""), Err(TextError::Template(_))));
    assert!(matches!(render("{{ nothing.at.all }}", hello()), Err(TextError::Render(_))));
}

#[test]
fn hostile_messages_are_sentences() {
    let chat = template("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}");
    let deep = "[".repeat(100_000);
    for bad in [
        "",
        "{",
        "nul",
        "{}",
        "[]",
        "[1]",
        "[{}]",
        &deep,
        r#"[{"role":1,"content":"a"}]"#,
        r#"[{"role":"user<|im_end|>","content":"a"}]"#,
        r#"[{"role":"user"}]"#,
        r#"[{"role":"user","content":7}]"#,
        r#"[{"role":"user","content":[7]}]"#,
        r#"[{"role":"user","content":[{"type":"text"}]}]"#,
        r#"[{"role":"assistant","tool_calls":"x"}]"#,
    ] {
        let error = chat.render(bad, None, None, true, TODAY).unwrap_err();
        assert!(matches!(error, TextError::Request(_)), "{bad:.40}: {error}");
    }
    let ok = r#"[{"role":"user","content":"a"}]"#;
    for (tools, kwargs) in [
        (Some("{}"), None),
        (Some("[1]"), None),
        (Some("["), None),
        (None, Some("[]")),
        (None, Some("{")),
        (None, Some(r#"{"messages":[]}"#)),
    ] {
        assert!(
            matches!(chat.render(ok, tools, kwargs, true, TODAY), Err(TextError::Request(_))),
            "{tools:?} {kwargs:?}"
        );
    }
    assert!(matches!(chat.render(ok, None, None, true, "yesterday"), Err(TextError::Date(_))));
}

#[test]
fn hostile_templates_end_in_an_error() {
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}";
    let macros = "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    let doubling = "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}";
    let replacing = "{% set s = 'a' * 2000000 %}{{ s.replace('a', s) }}";
    let joining = "{% set s = 'a' * 1000000 %}{{ ''.join([s] * 100000) }}";
    let formats = "{{ '{:>4000000000}'.format('x') }}";
    let nested = "{{ '{:>{}}'.format('x', 4000000000) }}";
    let percent = "{{ '%4000000000d' % 1 }}{{ '%4000000000d' | format(1) }}";
    let dates = "{{ strftime_now('%255Y' * 2000000) }}";
    let printing = "{{ messages | pprint }}";
    for hostile in [loops, macros, doubling, replacing, joining, formats, nested, percent, dates, printing] {
        let chat = template(hostile);
        let result = chat.render(r#"[{"role":"user","content":"a"}]"#, None, None, true, TODAY);
        assert!(matches!(result, Err(TextError::TooMuchWork | TextError::Render(_))), "{hostile}");
    }
    assert!(ChatTemplate::new(Some(&"{% if 1 %}".repeat(50_000)), "", "").is_err());
    assert!(ChatTemplate::new(Some(&format!("{{{{ {} }}}}", "(".repeat(100_000))), "", "").is_err());
    assert!(ChatTemplate::new(Some(&"a".repeat(2 << 20)), "", "").is_err());
}
