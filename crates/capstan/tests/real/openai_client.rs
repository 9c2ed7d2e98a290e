//! The official `openai` Python client lists models, chats and streams.
use crate::daemons::Cluster;
use capstan_testkit::models;

const SCRIPT: &str = r#"
import sys
from openai import OpenAI, NotFoundError, BadRequestError

client = OpenAI(base_url=sys.argv[1], api_key="unused", max_retries=0)
assert [m.id for m in client.models.list()] == ["smol"]
assert client.models.retrieve("smol").id == "smol"
messages = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]
ask = dict(model="smol", messages=messages, temperature=0, max_tokens=24)
whole = client.chat.completions.create(**ask)
text = whole.choices[0].message.content
assert "Paris" in text, text
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
parts, usage, reasons = [], None, []
for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
    if chunk.choices:
        parts.append(chunk.choices[0].delta.content or "")
        reasons.append(chunk.choices[0].finish_reason)
    usage = chunk.usage or usage
assert "".join(parts) == text, (parts, text)
assert usage.completion_tokens == whole.usage.completion_tokens and reasons[-1] in ("stop", "length")
scored = client.chat.completions.create(**{**ask, "max_tokens": 3}, logprobs=True, top_logprobs=2)
first = scored.choices[0].logprobs.content[0]
assert len(first.top_logprobs) == 2 and first.top_logprobs[0].logprob == first.logprob <= 0
plain = client.completions.create(model="smol", prompt="Once upon a time", max_tokens=8, temperature=0)
assert plain.choices[0].text
stopped = client.chat.completions.create(**ask, stop=["Paris"])
assert "Paris" not in stopped.choices[0].message.content and stopped.choices[0].finish_reason == "stop"
for error, bad in ((NotFoundError, {**ask, "model": "nobody"}), (BadRequestError, {**ask, "temperature": -3})):
    try:
        client.chat.completions.create(**bad)
        raise SystemExit(f"{bad} was accepted")
    except error as e:
        assert e.message and e.body["message"], e
print("all well")
"#;

#[tokio::test(flavor = "multi_thread")]
async fn the_official_python_client_works() {
    let python = std::env::var_os("CAPSTAN_TEST_PYTHON")
        .expect("CAPSTAN_TEST_PYTHON names a Python that has the `openai` package; `make test` makes one");
    let cluster = Cluster::start(&["alpha", "beta"]).await;
    cluster.load(&models::smollm2(), "smol", &["--ctx", "1024"]).await;
    // Asked on the node that does not hold the model file.
    let url = format!("http://{}/v1", cluster.nodes[1].api);
    let output = tokio::process::Command::new(python)
        .args(["-c", SCRIPT, &url])
        .env_remove("OPENAI_API_KEY")
        .output()
        .await
        .expect("python starts");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
}
