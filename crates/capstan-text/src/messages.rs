//! Messages, tools and template variables from a client: hostile JSON until parsed, then in the shape a template takes.
use capstan_proto::limits::PROMPT_BYTES_MAX;
use serde_json::{Map, Value};

use crate::TextError;
use crate::error::quote;

/// Roles of OpenAI's API. A template prints the role into the prompt, so nothing else may pass.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];
/// Template variables that the request has other fields for.
const RESERVED: [&str; 5] = ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token"];

/// What a template can do with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// It takes `content` as a string.
    pub text: bool,
    /// It takes `content` as an array of parts.
    pub parts: bool,
    /// It knows the role `developer`.
    pub developer: bool,
}

/// How far messages are bent to what older templates take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Arguments of tool calls are objects, and content may be null.
    Modern,
    /// Arguments of tool calls are strings of JSON, and content is always a string.
    Plain,
}

fn bad<T>(message: String) -> Result<T, TextError> {
    Err(TextError::Request(message))
}

fn parse(what: &str, text: &str) -> Result<Value, TextError> {
    if text.len() > PROMPT_BYTES_MAX {
        return bad(format!("{what} has {} bytes; at most {PROMPT_BYTES_MAX} are taken", text.len()));
    }
    serde_json::from_str(text).or_else(|e| bad(format!("{what} is not valid JSON ({e}); mend it and send it again")))
}

/// A conversation whose every message has a known role and content of a known kind.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Conversation(Vec<Map<String, Value>>);

impl Conversation {
    /// Parses and checks `messages`.
    pub fn parse(text: &str) -> Result<Self, TextError> {
        let Value::Array(list) = parse("messages", text)? else {
            return bad("messages must be an array of objects with a role and content".into());
        };
        if list.is_empty() {
            return bad("messages is empty; send at least one message".into());
        }
        list.into_iter().enumerate().map(|(i, m)| check_message(i, m)).collect::<Result<_, _>>().map(Self)
    }

    /// The messages as this template takes them.
    pub fn shaped(&self, shape: Shape, form: Form) -> Value {
        self.0.iter().map(|m| Value::Object(shape_message(m.clone(), shape, form))).collect()
    }
}

fn check_message(i: usize, message: Value) -> Result<Map<String, Value>, TextError> {
    let Value::Object(mut message) = message else {
        return bad(format!("messages[{i}] must be an object with a role and content"));
    };
    let role = match message.get("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
        Some(Value::String(role)) => {
            return bad(format!("messages[{i}].role is {:?}; it must be one of {}", quote(role), ROLES.join(", ")));
        }
        _ => return bad(format!("messages[{i}] has no role; it must be one of {}", ROLES.join(", "))),
    };
    let calls = check_tool_calls(i, &message)?;
    match message.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => check_parts(i, parts)?,
        None | Some(Value::Null) if role == "assistant" => {
            message.insert("content".into(), if calls { Value::Null } else { Value::String(String::new()) });
        }
        None | Some(Value::Null) => {
            return bad(format!(
                "messages[{i}] has no content; a {role} message needs a string or an array of text parts"
            ));
        }
        Some(_) => return bad(format!("messages[{i}].content must be a string or an array of text parts")),
    }
    Ok(message)
}

/// Whether the message calls tools.
fn check_tool_calls(i: usize, message: &Map<String, Value>) -> Result<bool, TextError> {
    match message.get("tool_calls") {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Array(calls)) if calls.iter().all(Value::is_object) => Ok(!calls.is_empty()),
        Some(_) => bad(format!("messages[{i}].tool_calls must be an array of objects")),
    }
}

fn check_parts(i: usize, parts: &[Value]) -> Result<(), TextError> {
    for (j, part) in parts.iter().enumerate() {
        match (part.get("type").and_then(Value::as_str), part.get("text")) {
            (Some("text"), Some(Value::String(_))) => {}
            (Some("text"), _) => return bad(format!("messages[{i}].content[{j}] is of type text but has no text")),
            (Some(kind), _) => {
                return bad(format!(
                    "messages[{i}].content[{j}] is of type {:?}, and models are served with text only; send text parts",
                    quote(kind)
                ));
            }
            (None, _) => return bad(format!("messages[{i}].content[{j}] must be an object with type and text")),
        }
    }
    Ok(())
}

fn shape_message(mut message: Map<String, Value>, shape: Shape, form: Form) -> Map<String, Value> {
    if !shape.developer && message.get("role").is_some_and(|r| r == "developer") {
        message.insert("role".into(), "system".into());
    }
    let content = match message.get("content") {
        Some(Value::Array(parts)) if !shape.parts => {
            let texts: Vec<&str> = parts.iter().filter_map(|p| p.get("text")?.as_str()).collect();
            Some(Value::String(texts.join("\n")))
        }
        Some(Value::String(text)) if !shape.text && shape.parts => {
            Some(Value::Array(vec![serde_json::json!({"type": "text", "text": text})]))
        }
        Some(Value::Null) if form == Form::Plain => Some(Value::String(String::new())),
        _ => None,
    };
    if let Some(content) = content {
        message.insert("content".into(), content);
    }
    // Clients send arguments as a string of JSON, as OpenAI does; most templates want the object in it.
    if let (Form::Modern, Some(Value::Array(calls))) = (form, message.get_mut("tool_calls")) {
        for arguments in calls.iter_mut().filter_map(|c| c.get_mut("function")?.get_mut("arguments")) {
            let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok());
            if let Some(object) = parsed {
                *arguments = Value::Object(object);
            }
        }
    }
    message
}

/// Tool definitions: an array of objects; none and an empty one are the same.
pub(crate) fn parse_tools(text: Option<&str>) -> Result<Value, TextError> {
    match text.map(|t| parse("tools", t)).transpose()? {
        None | Some(Value::Null) => Ok(Value::Null),
        Some(Value::Array(list)) if list.is_empty() => Ok(Value::Null),
        Some(Value::Array(list)) if list.iter().all(Value::is_object) => Ok(Value::Array(list)),
        Some(_) => bad("tools must be an array of objects with type and function".into()),
    }
}

/// Further template variables: an object that does not touch what the request has other fields for.
pub(crate) fn parse_kwargs(text: Option<&str>) -> Result<Map<String, Value>, TextError> {
    let map = match text.map(|t| parse("chat_template_kwargs", t)).transpose()? {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(map)) => map,
        Some(_) => return bad("chat_template_kwargs must be an object".into()),
    };
    match RESERVED.iter().find(|name| map.contains_key(**name)) {
        Some(name) => bad(format!("chat_template_kwargs must not set {name}; the request has its own field for it")),
        None => Ok(map),
    }
}
