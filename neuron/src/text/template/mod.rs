//! The model's chat template: messages in, prompt out. Compiled once.

mod functions;

use minijinja::{Environment, Error};
use protocol::chat::{Content, Message, Tool};
use serde::Serialize;

const NAME: &str = "chat_template";

/// A compiled chat template with the variables that belong to the model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// What a template renders.
#[derive(Debug, Clone, Copy)]
pub struct Conversation<'a> {
    /// The messages so far.
    pub messages: &'a [Message],
    /// The tools the model may call.
    pub tools: &'a [Tool],
    /// End with the beginning of an answer.
    pub add_generation_prompt: bool,
    /// Variables the request gives the template, the thinking switch among them.
    pub variables: &'a serde_json::Map<String, serde_json::Value>,
}

/// A conversation that could not be rendered, or a template that could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template is not valid.
    #[error("the chat template cannot be compiled: {0}")]
    Invalid(String),
    /// The template itself refused the conversation.
    #[error("{0}")]
    Refused(String),
    /// The template failed on the conversation.
    #[error("the chat template failed: {0}")]
    Failed(String),
    /// `arguments` of an earlier call is not an object written as JSON.
    #[error("the arguments of an earlier tool call must be a JSON object in a string: {reason}")]
    Arguments {
        /// Which message.
        message: usize,
        /// Which of its calls.
        call: usize,
        /// What is wrong with it.
        reason: String,
    },
}

impl ChatTemplate {
    /// Compiles `source`. The tokens are those `tokenizer_config.json` names.
    ///
    /// # Errors
    /// [`TemplateError::Invalid`].
    pub fn compile(
        source: String,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        functions::add_to(&mut environment);
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| TemplateError::Invalid(describe(&error)))?;
        Ok(Self {
            environment,
            bos_token,
            eos_token,
        })
    }

    /// The prompt of `conversation`, ready for the model to answer. Where the template refuses a system message that is
    /// not the first, it gets the same words in an order that it takes.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] with the template's own words, or one of the other two.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, TemplateError> {
        let refused = match self.render_as_it_is(conversation) {
            Err(error @ TemplateError::Refused(_)) => error,
            rendered => return rendered,
        };
        match with_one_system_message(conversation.messages) {
            None => Err(refused),
            Some(messages) => self.render_as_it_is(&Conversation {
                messages: &messages,
                ..*conversation
            }),
        }
    }

    fn render_as_it_is(&self, conversation: &Conversation<'_>) -> Result<String, TemplateError> {
        let mut context = conversation.variables.clone();
        let mut set = |name: &str, value: serde_json::Value| {
            context.insert(name.to_owned(), value);
        };
        set("messages", messages(conversation.messages)?.into());
        if !conversation.tools.is_empty() {
            set("tools", json(&conversation.tools));
        }
        set(
            "add_generation_prompt",
            conversation.add_generation_prompt.into(),
        );
        if let Some(token) = &self.bos_token {
            set("bos_token", token.as_str().into());
        }
        if let Some(token) = &self.eos_token {
            set("eos_token", token.as_str().into());
        }
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(&context))
            .map_err(|error| match functions::raised(&error) {
                Some(message) => TemplateError::Refused(message.to_owned()),
                None => TemplateError::Failed(describe(&error)),
            })
    }
}

fn describe(error: &Error) -> String {
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("line {line}: {detail}"),
        None => detail,
    }
}

fn json(value: &impl Serialize) -> serde_json::Value {
    serde_json::to_value(value).expect("wire types always serialise")
}

/// The conversation with its system messages as every template takes them: those at its beginning in one, later ones
/// said by the user at their place. `None` where there is none but the first.
fn with_one_system_message(messages: &[Message]) -> Option<Vec<Message>> {
    let is_system = |message: &Message| matches!(&*message.role, "system" | "developer");
    if !messages.iter().skip(1).any(is_system) {
        return None;
    }
    let first = messages.iter().take_while(|message| is_system(message));
    let (leading, rest) = messages.split_at(first.count());
    let mut all = Vec::with_capacity(messages.len());
    if let [first, ..] = leading {
        let texts: Vec<_> = leading
            .iter()
            .filter_map(|message| Some(message.content.as_ref()?.text()))
            .collect();
        all.push(Message {
            content: Some(Content::Text(texts.join("\n\n"))),
            ..first.clone()
        });
    }
    all.extend(rest.iter().cloned().map(|mut message| {
        if is_system(&message) {
            message.role = "user".into();
        }
        message
    }));
    Some(all)
}

/// Messages as templates expect them: arguments of calls as objects, `developer` by its older name.
fn messages(messages: &[Message]) -> Result<Vec<serde_json::Value>, TemplateError> {
    let mut rendered = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        let mut value = json(message);
        if message.role == "developer" {
            value["role"] = "system".into();
        }
        if let Some(fields) = value.as_object_mut() {
            fields.shift_remove("thinking_blocks"); // what is signed or encrypted is no text for a model
        }
        for (call, given) in message.tool_calls.iter().flatten().enumerate() {
            let text = match given.function.arguments.trim() {
                "" => "{}",
                text => text,
            };
            let arguments: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)
                .map_err(|error| TemplateError::Arguments {
                    message: index,
                    call,
                    reason: error.to_string(),
                })?;
            value["tool_calls"][call]["function"]["arguments"] = arguments.into();
        }
        rendered.push(value);
    }
    Ok(rendered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::fixture;
    use serde_json::json;

    fn template() -> ChatTemplate {
        let source = std::fs::read_to_string(fixture().join("chat_template.jinja")).unwrap();
        ChatTemplate::compile(source, None, Some("<|im_end|>".into())).unwrap()
    }

    fn try_render(
        template: &ChatTemplate,
        request: serde_json::Value,
    ) -> Result<String, TemplateError> {
        let messages: Vec<Message> = serde_json::from_value(request["messages"].clone()).unwrap();
        let tools: Vec<Tool> = request
            .get("tools")
            .map(|tools| serde_json::from_value(tools.clone()).unwrap())
            .unwrap_or_default();
        let variables = request["variables"]
            .as_object()
            .cloned()
            .unwrap_or_default();
        template.render(&Conversation {
            messages: &messages,
            tools: &tools,
            add_generation_prompt: true,
            variables: &variables,
        })
    }

    fn render(request: serde_json::Value) -> String {
        try_render(&template(), request).unwrap()
    }

    fn inline(source: &str) -> String {
        let template = ChatTemplate::compile(source.into(), Some("<s>".into()), None).unwrap();
        try_render(
            &template,
            json!({"messages": [], "variables": {"x": {"b": [1, "é<'>"], "a": null, "t": true}}}),
        )
        .unwrap()
    }

    #[test]
    fn a_plain_conversation_is_chatml_with_thinking_off() {
        assert_eq!(
            render(json!({"messages": [
                {"role": "developer", "content": " Be brief. "},
                {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]},
                {"role": "assistant", "content": "<think>\nold\n</think>\n\nHello."},
                {"role": "user", "content": "Bye"},
            ]})),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n\
             <|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n\
             <|im_start|>assistant\n<think>\n\n</think>\n\n"
        );
    }

    #[test]
    fn thinking_is_opened_when_asked_for() {
        let prompt = render(json!({
            "messages": [{"role": "user", "content": "Hi"}],
            "variables": {"enable_thinking": true},
        }));
        assert!(
            prompt.ends_with("<|im_start|>assistant\n<think>\n"),
            "{prompt}"
        );
    }

    #[test]
    fn system_messages_may_stand_anywhere() {
        let prompt = render(json!({"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "content": "Hi"},
            {"role": "system", "content": "Be loud."},
            {"role": "user", "content": "Bye"},
        ]}));
        assert!(
            prompt.starts_with(
                "<|im_start|>system\nBe brief.\n\nBe kind.<|im_end|>\n\
                 <|im_start|>user\nHi<|im_end|>\n<|im_start|>user\nBe loud.<|im_end|>\n\
                 <|im_start|>user\nBye<|im_end|>\n"
            ),
            "{prompt}"
        );
        let takes_them = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}";
        let takes_them = ChatTemplate::compile(takes_them.into(), None, None).unwrap();
        let messages =
            json!([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]);
        assert_eq!(
            try_render(&takes_them, json!({"messages": messages})).unwrap(),
            "ua;sb;",
            "a template that takes them gets them as they are"
        );
    }

    #[test]
    fn a_template_is_not_shown_signed_or_encrypted_thinking() {
        let all = "{{ messages | tojson }}".to_owned();
        let template = ChatTemplate::compile(all, None, None).expect("compiles");
        let messages: Vec<Message> = serde_json::from_value(json!([{
            "role": "assistant", "reasoning_content": "hm",
            "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s"}],
        }]))
        .expect("messages");
        let prompt = template.render(&Conversation {
            messages: &messages,
            tools: &[],
            add_generation_prompt: false,
            variables: &serde_json::Map::new(),
        });
        assert_eq!(
            prompt.expect("renders"),
            r#"[{"role": "assistant", "reasoning_content": "hm"}]"#
        );
    }

    #[test]
    fn calls_and_results_are_written_in_the_models_form() {
        let prompt = render(json!({
            "messages": [
                {"role": "user", "content": "Find"},
                {"role": "assistant", "content": null, "reasoning_content": "look", "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "find",
                     "arguments": "{\"text\": \"é\", \"deep\": true, \"where\": {\"b\": 1, \"a\": [2]}}"}},
                    {"id": "2", "type": "function", "function": {"name": "now", "arguments": ""}},
                ]},
                {"role": "tool", "tool_call_id": "1", "content": "one"},
                {"role": "tool", "tool_call_id": "2", "content": "two"},
            ],
            "tools": [{"type": "function", "function": {"name": "find", "description": "<é>"}}],
        }));
        assert!(
            prompt.starts_with("<|im_start|>system\n# Tools\n"),
            "{prompt}"
        );
        assert!(
            prompt.contains("\n{\"type\": \"function\", \"function\": {\"name\": \"find\", \"description\": \"<é>\"}}\n</tools>"),
            "{prompt}"
        );
        assert!(
            prompt.contains(
                "<|im_start|>assistant\n<think>\nlook\n</think>\n\n<tool_call>\n<function=find>\n\
                 <parameter=text>\né\n</parameter>\n<parameter=deep>\nTrue\n</parameter>\n\
                 <parameter=where>\n{\"b\": 1, \"a\": [2]}\n</parameter>\n</function>\n</tool_call>\n\
                 <tool_call>\n<function=now>\n</function>\n</tool_call><|im_end|>\n\
                 <|im_start|>user\n<tool_response>\none\n</tool_response>\n\
                 <tool_response>\ntwo\n</tool_response><|im_end|>\n"
            ),
            "{prompt}"
        );
    }

    #[test]
    fn a_refusal_has_the_templates_own_words() {
        let picky = "{% for m in messages %}{{ raise_exception('no ' ~ m.role) }}{% endfor %}";
        let picky = ChatTemplate::compile(picky.into(), None, None).unwrap();
        for messages in [
            json!([{"role": "user", "content": "Hi"}]),
            json!([{"role": "user", "content": "Hi"}, {"role": "system", "content": "late"}]),
        ] {
            let error = try_render(&picky, json!({"messages": messages})).unwrap_err();
            assert!(
                matches!(&error, TemplateError::Refused(words) if words == "no user"),
                "{error:?}"
            );
        }
        let broken = ChatTemplate::compile("{{ 1 + [] }}".into(), None, None).unwrap();
        let error = try_render(&broken, json!({"messages": []})).unwrap_err();
        assert!(matches!(error, TemplateError::Failed(_)), "{error:?}");
        let invalid = ChatTemplate::compile("{% if %}".into(), None, None).unwrap_err();
        assert!(matches!(invalid, TemplateError::Invalid(_)), "{invalid:?}");
    }

    #[test]
    fn arguments_that_are_no_object_are_named() {
        let request = json!({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": "[1]"}}]}]});
        let error = try_render(&template(), request).unwrap_err();
        assert!(
            matches!(
                error,
                TemplateError::Arguments {
                    message: 0,
                    call: 0,
                    ..
                }
            ),
            "{error:?}"
        );
    }

    // The list of what the released templates use, from the description of the format.
    #[test]
    fn the_jinja_of_released_templates_is_understood() {
        for (source, wanted) in [
            (
                "{% macro m(a, b='x') %}{{ a ~ b }}{% endmacro %}{{ m('1') }}{{ m('1', b='2') }}",
                "1x12",
            ),
            (
                "{% set n = namespace(a=1) %}{% for i in [1, 2] %}{% set n.a = n.a + i %}{% endfor %}{{ n.a }}",
                "4",
            ),
            (
                "{% for i in [1, 2, 3][::-1] %}{{ i }}{{ loop.index0 }}{{ loop.last }} {% endfor %}",
                "30False 21False 12True ",
            ),
            (
                "{% for i in 'ab' | list %}{{ loop.previtem | default('-') }}{{ loop.nextitem is defined }} {% endfor %}",
                "-True aFalse ",
            ),
            (
                "{{ x is mapping }} {{ x.b is sequence }} {{ x.b is iterable }} {{ x.t is true }} {{ x.t is false }}",
                "True True True True False",
            ),
            (
                "{{ x.a is none }} {{ x.c is undefined }} {{ 'a' is string }}",
                "True True True",
            ),
            (
                "{% for k, v in x | items %}{{ k }}{% endfor %}{{ x | length }}",
                "bat3",
            ),
            (
                "{{ ' a ' | trim | safe }}{{ 'abc'.startswith('a') and not 'abc'.endswith('b') }}",
                "aTrue",
            ),
            (
                "{{ '\n\na\n'.lstrip('\n').rstrip('\n') }}|{{ 'a</t>b'.split('</t>')[-1] }}",
                "a|b",
            ),
            (
                "{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\ny",
                "x\ny",
            ),
        ] {
            assert_eq!(inline(source), wanted, "{source}");
        }
    }

    #[test]
    fn json_is_written_as_transformers_writes_it() {
        assert_eq!(
            inline("{{ x | tojson }}"),
            "{\"b\": [1, \"é<'>\"], \"a\": null, \"t\": true}"
        );
        assert_eq!(
            inline("{{ [1, {}] | tojson(indent=2) }}"),
            "[\n  1,\n  {}\n]"
        );
        assert_eq!(
            inline("{{ x.t }} {{ x.t | string }} {{ x.a }}{{ nothing }}"),
            "True True None"
        );
        assert_eq!(inline("{{ bos_token }}{{ '<b>' }}"), "<s><b>");
        assert_eq!(inline("{{ ' a\n'.rstrip('\\n').split(' ')[-1] }}"), "a");
    }
}
