//! Models as this API lists them, a page at a time.

use protocol::ApiError;
use protocol::models::ModelCard;
use serde_json::{Value, json};

/// How many models a page has when nobody says, and at most.
const PAGE: (usize, usize) = (20, 1000);

/// The page of `cards` that `query` asks for.
pub(super) fn page(cards: Vec<ModelCard>, query: &str) -> Result<Value, ApiError> {
    let mut wish = Wish::read(query)?;
    let cards: Vec<ModelCard> = cards.into_iter().filter(|_| wish.active).collect();
    let place = |id: &str| cards.iter().position(|card| card.id == id);
    let (from, to) = match (wish.before.take(), wish.after.take()) {
        (Some(id), _) => {
            let end = place(&id).ok_or_else(|| unknown("before_id", &id))?;
            (end.saturating_sub(wish.limit), end)
        }
        (None, Some(id)) => {
            let start = place(&id).ok_or_else(|| unknown("after_id", &id))? + 1;
            (start, cards.len().min(start + wish.limit))
        }
        (None, None) => (0, cards.len().min(wish.limit)),
    };
    let more = if wish.backwards {
        from > 0
    } else {
        to < cards.len()
    };
    let shown = &cards[from..to];
    Ok(json!({
        "data": shown.iter().map(model).collect::<Vec<_>>(),
        "first_id": shown.first().map(|card| &card.id),
        "last_id": shown.last().map(|card| &card.id),
        "has_more": more,
    }))
}

/// What a query asks for.
struct Wish {
    limit: usize,
    before: Option<String>,
    after: Option<String>,
    backwards: bool,
    /// Every model here is active: a query for others finds none.
    active: bool,
}

impl Wish {
    fn read(query: &str) -> Result<Self, ApiError> {
        let mut wish = Self {
            limit: PAGE.0,
            before: None,
            after: None,
            backwards: false,
            active: true,
        };
        let mut lifecycles = Vec::new();
        for (name, value) in crate::query::pairs(query) {
            match name.as_str() {
                "limit" => {
                    let limit = value.parse().ok();
                    wish.limit = limit
                        .filter(|limit| (1..=PAGE.1).contains(limit))
                        .ok_or_else(|| {
                            let message = format!("limit: must be a number from 1 to {}", PAGE.1);
                            ApiError::invalid("limit", message)
                        })?;
                }
                "before_id" => (wish.before, wish.backwards) = (Some(value), true),
                "after_id" => wish.after = Some(value),
                "lifecycle" | "lifecycle[]" => lifecycles.push(value),
                _ => {}
            }
        }
        wish.active = lifecycles.is_empty() || lifecycles.iter().any(|cycle| cycle == "active");
        Ok(wish)
    }
}

fn unknown(name: &str, id: &str) -> ApiError {
    ApiError::invalid(name, format!("{name}: there is no model `{id}` here"))
}

/// One model. What this API has no word for stands beside it: `state` and `nodes`.
pub(super) fn model(card: &ModelCard) -> Value {
    let can = |what: &str| json!({"supported": card.can(what)});
    let not = json!({"supported": false});
    let capabilities = card.capabilities.as_ref().map(|_| {
        json!({
            "batch": not,
            "citations": not,
            "code_execution": not,
            "context_management": not,
            "effort": {
                "supported": card.can("thinking"),
                "low": can("thinking"), "medium": can("thinking"), "high": can("thinking"),
                "xhigh": can("thinking"), "max": can("thinking"),
            },
            "image_input": can("images"),
            "pdf_input": not,
            "server_tools": {"supported": false, "code_execution": not, "web_search": not},
            "structured_outputs": can("structured_outputs"),
            "thinking": {
                "supported": card.can("thinking"),
                "types": {
                    "adaptive": can("thinking"), "between_tools": not,
                    "disabled": can("thinking"), "enabled": can("thinking"),
                },
            },
        })
    });
    json!({
        "type": "model",
        "id": card.id,
        "display_name": card.id,
        "created_at": rfc3339(card.created),
        "lifecycle": "active",
        "max_input_tokens": card.context_length,
        "max_tokens": card.context_length,
        "capabilities": capabilities,
        "state": card.state,
        "nodes": card.nodes,
    })
}

/// Unix seconds as RFC 3339 writes them, in UTC.
fn rfc3339(seconds: u64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cards() -> Vec<ModelCard> {
        ["a", "b", "c", "d", "e"]
            .map(|id| ModelCard::new(id, "cortex", 1_700_000_000))
            .into()
    }

    /// The ids of a page, and whether there are more.
    fn ids(query: &str) -> (String, bool) {
        let page = page(cards(), query).expect("a page");
        let data = page["data"].as_array().expect("a list");
        let ids: String = data
            .iter()
            .map(|model| model["id"].as_str().expect("an id"))
            .collect();
        let ends = |at: usize| {
            data.get(at)
                .map(|model| model["id"].clone())
                .unwrap_or_default()
        };
        assert_eq!(page["first_id"], ends(0));
        assert_eq!(page["last_id"], ends(data.len().wrapping_sub(1)));
        (ids, page["has_more"] == true)
    }

    #[test]
    fn pages_follow_one_another_both_ways() {
        assert_eq!(ids(""), ("abcde".into(), false));
        assert_eq!(ids("limit=2"), ("ab".into(), true));
        assert_eq!(ids("limit=2&after_id=b"), ("cd".into(), true));
        assert_eq!(ids("limit=2&after_id=d"), ("e".into(), false));
        assert_eq!(ids("limit=2&after_id=e"), (String::new(), false));
        assert_eq!(ids("limit=2&before_id=d"), ("bc".into(), true));
        assert_eq!(ids("limit=2&before_id=b"), ("a".into(), false));
        assert_eq!(ids("lifecycle=retired"), (String::new(), false));
        for bad in ["limit=0", "limit=x", "after_id=z", "before_id=z"] {
            let error = page(cards(), bad).expect_err(bad);
            assert!(bad.starts_with(error.param.as_deref().expect("a name")));
        }
    }

    #[test]
    fn a_model_says_since_when_and_what_it_can() {
        let mut card = cards().remove(0);
        assert_eq!(model(&card)["created_at"], "2023-11-14T22:13:20Z");
        assert_eq!(model(&card)["capabilities"], Value::Null);
        card.capabilities = Some(vec!["chat".into(), "thinking".into()]);
        let capabilities = &model(&card)["capabilities"];
        assert_eq!(
            capabilities["thinking"]["types"]["enabled"]["supported"],
            true
        );
        assert_eq!(capabilities["image_input"]["supported"], false);
    }
}
