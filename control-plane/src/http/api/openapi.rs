//! The API's description (OpenAPI 3.1), made from the table of operations, and a page that shows it.

use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use serde_json::{Value, json};

use super::{Needs, Operation, operations};

pub async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], describe(&operations()).to_string()).into_response()
}

pub async fn page() -> Response {
    // The page has no other source than this host.
    let policy =
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'";
    (StatusCode::OK, [(header::CONTENT_SECURITY_POLICY, policy)], Html(include_str!("docs.html")))
        .into_response()
}

fn describe(operations: &[Operation]) -> Value {
    let mut paths = serde_json::Map::new();
    for operation in operations {
        let entry = paths.entry(operation.path).or_insert_with(|| json!({}));
        entry[operation.verb] = describe_one(operation);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Keygate",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Issues and ends API keys that Envoy enforces. Times are RFC 3339 UTC, durations texts such as \"24h\".",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer", "bearerFormat": "apikey+jwt" },
                "apiKey": { "type": "apiKey", "in": "header", "name": "x-api-key" },
            },
            "schemas": {
                "Problem": {
                    "description": "RFC 9457",
                    "type": "object",
                    "required": ["type", "title", "status", "code", "detail"],
                    "properties": {
                        "type": { "type": "string" },
                        "title": { "type": "string" },
                        "status": { "type": "integer" },
                        "code": { "type": "string", "description": "stable; for programs" },
                        "detail": { "type": "string", "description": "for people" },
                    },
                },
            },
        },
    })
}

fn describe_one(operation: &Operation) -> Value {
    let mut parameters: Vec<Value> = operation
        .query
        .iter()
        .map(|(name, description)| {
            json!({ "name": name, "in": "query", "description": description, "schema": { "type": "string" } })
        })
        .collect();
    if operation.path.contains("{id}") {
        parameters
            .push(json!({ "name": "id", "in": "path", "required": true, "schema": { "type": "string" } }));
    }
    let name = operation.path.trim_start_matches("/api/").replace(['/', '{', '}', '.', '-'], "_");
    let mut described = json!({
        "operationId": format!("{}_{}", operation.verb, name.trim_matches('_')),
        "summary": operation.summary,
        "parameters": parameters,
        "responses": {
            operation.success.to_string(): { "description": "Done" },
            "default": {
                "description": "Refused, or failed",
                "content": { "application/problem+json": { "schema": { "$ref": "#/components/schemas/Problem" } } },
            },
        },
    });
    let local = "Done, and in the journal; not in Redis and its replicas yet, though 'durability' is set to 'replicated'";
    let accepted = match operation.accepted {
        Some(meaning) => Some(format!("{meaning}. Or: {local}")),
        None => (operation.verb != "get").then(|| local.to_owned()),
    };
    if let Some(meaning) = accepted {
        described["responses"]["202"] = json!({ "description": meaning });
    }
    if operation.needs != Needs::Nothing {
        described["security"] = json!([{ "bearer": [] }, { "apiKey": [] }]);
    }
    if let Needs::Scope(scope) = operation.needs {
        described["x-required-scope"] = scope.into();
    }
    if let Some(example) = operation.body {
        let example: Value = serde_json::from_str(example).unwrap_or_default();
        described["requestBody"] = json!({ "content": { "application/json": { "schema": { "type": "object" }, "example": example } } });
    }
    described
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_described_once_with_its_scope_and_a_readable_example() {
        let operations = operations();
        let document = describe(&operations);
        let mut ids = std::collections::BTreeSet::new();
        for operation in &operations {
            let described = &document["paths"][operation.path][operation.verb];
            assert!(ids.insert(described["operationId"].as_str().unwrap().to_owned()), "{}", operation.path);
            if let Needs::Scope(scope) = operation.needs {
                assert_eq!(described["x-required-scope"], scope);
            }
            if let Some(example) = operation.body {
                assert!(serde_json::from_str::<Value>(example).is_ok(), "{example}");
            }
            assert!(!operation.path.starts_with("/api/admin") || matches!(operation.needs, Needs::Scope(_)));
        }
    }
}
