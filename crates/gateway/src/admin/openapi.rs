//! The table of routes as OpenAPI 3.1.

use serde_json::{Map, Value, json};

use super::routes::{Route, Shape};

/// A schema: its name, and fields with their types. `?` after a type: may be `null` or absent.
type Schema = (&'static str, &'static [(&'static str, &'static str)]);

/// What is answered with an `ETag`: records, and what became of them.
const VERSIONED: &[&str] = &["Key", "NewKey", "User", "Ban", "Rule", "RolledBack", "Drain"];

/// Every shape of the API.
const SCHEMAS: &[Schema] = &[
    (
        "Problem",
        &[
            ("type", "string"),
            ("title", "string"),
            ("status", "integer"),
            ("detail", "string"),
            ("errors", "Fault[]?"),
        ],
    ),
    ("Fault", &[("field", "string"), ("detail", "string")]),
    (
        "Key",
        &[
            ("id", "string"),
            ("status", "string"),
            ("name", "string?"),
            ("user", "string?"),
            ("team", "string?"),
            ("tier", "string?"),
            ("models", "string[]?"),
            ("limits", "string[]?"),
            ("metadata", "object?"),
            ("created", "time"),
            ("expires", "time?"),
            ("revoked", "time?"),
            ("previous", "object?"),
            ("displaced", "string?"),
            ("version", "integer"),
        ],
    ),
    ("NewKey", &[("id", "string"), ("key", "string"), ("status", "string"), ("version", "integer")]),
    (
        "KeySettings",
        &[
            ("name", "string?"),
            ("user", "string?"),
            ("team", "string?"),
            ("tier", "string?"),
            ("models", "string[]?"),
            ("limits", "string[]?"),
            ("metadata", "object?"),
            ("expires", "time?"),
            ("expires_in", "string?"),
        ],
    ),
    ("KeyImport", &[("keys", "object[]")]),
    ("Imported", &[("imported", "integer"), ("data", "Key[]")]),
    ("Rotation", &[("overlap", "string?"), ("expires", "time?"), ("expires_in", "string?")]),
    (
        "User",
        &[
            ("name", "string"),
            ("source", "string"),
            ("team", "string?"),
            ("tier", "string?"),
            ("models", "string[]?"),
            ("metadata", "object?"),
            ("created", "time?"),
            ("version", "integer?"),
        ],
    ),
    (
        "UserSettings",
        &[
            ("name", "string?"),
            ("team", "string?"),
            ("tier", "string?"),
            ("models", "string[]?"),
            ("metadata", "object?"),
        ],
    ),
    (
        "Ban",
        &[
            ("id", "string"),
            ("subject", "string"),
            ("reason", "string"),
            ("until", "time?"),
            ("created", "time"),
            ("version", "integer"),
        ],
    ),
    (
        "BanSettings",
        &[("subject", "string"), ("reason", "string"), ("until", "time?"), ("expires_in", "string?")],
    ),
    (
        "Rule",
        &[
            ("name", "string"),
            ("source", "string"),
            ("match", "object"),
            ("per", "string"),
            ("deny", "boolean"),
            ("shadow", "boolean"),
            ("limits", "LimitOfRule[]"),
            ("live", "CountedBy?"),
            ("created", "time?"),
            ("expires", "time?"),
            ("version", "integer?"),
            ("aside", "object?"),
        ],
    ),
    ("CountedBy", &[("counted_by", "string"), ("since", "time"), ("fullest_of", "string")]),
    (
        "LimitOfRule",
        &[
            ("id", "string"),
            ("quota", "string"),
            ("unit", "string"),
            ("window", "string?"),
            ("limit", "integer"),
            ("strategy", "string"),
            ("guarantee", "string"),
            ("live", "LiveLimit?"),
        ],
    ),
    (
        "LiveLimit",
        &[
            ("allowed", "integer"),
            ("refused", "integer"),
            ("shadow", "integer"),
            ("failed", "integer"),
            ("fullest", "Fullest?"),
        ],
    ),
    (
        "RuleSettings",
        &[
            ("match", "object?"),
            ("per", "any?"),
            ("limit", "any?"),
            ("strategy", "string?"),
            ("shadow", "boolean?"),
            ("deny", "boolean?"),
            ("expires", "time?"),
            ("expires_in", "string?"),
        ],
    ),
    (
        "LimitVersion",
        &[
            ("version", "integer"),
            ("time", "time"),
            ("actor", "string"),
            ("address", "string"),
            ("action", "string"),
            ("before", "object?"),
            ("after", "object?"),
        ],
    ),
    ("Rollback", &[("version", "integer")]),
    (
        "RolledBack",
        &[("name", "string"), ("rolled_back_to", "integer"), ("version", "integer"), ("rule", "Rule?")],
    ),
    ("Statistics", &[("status", "string"), ("stats", "Totals"), ("next_cursor", "string?")]),
    (
        "Totals",
        &[
            ("total_requests", "integer"),
            ("blocked_requests", "integer"),
            ("current_rates", "Rate{}"),
            ("redis_connected", "boolean"),
            ("last_update", "time"),
        ],
    ),
    (
        "Rate",
        &[
            ("key", "string"),
            ("current_count", "integer"),
            ("limit", "integer"),
            ("window", "string"),
            ("reset_time", "integer"),
            ("rule", "string"),
            ("unit", "string"),
        ],
    ),
    ("EndpointLimit", &[("endpoint", "string"), ("requests", "integer"), ("window", "integer")]),
    (
        "Configured",
        &[
            ("status", "string"),
            ("message", "string"),
            ("endpoint", "string"),
            ("requests", "integer"),
            ("window_seconds", "integer"),
        ],
    ),
    ("Cleared", &[("status", "string"), ("message", "string"), ("key", "string"), ("existed", "boolean")]),
    ("RedisStatus", &[("status", "string"), ("redis", "Redis")]),
    (
        "Redis",
        &[
            ("enabled", "boolean"),
            ("connected", "boolean"),
            ("addr", "string"),
            ("db", "integer"),
            ("pool_size", "integer"),
            ("topology", "string?"),
            ("version", "string?"),
            ("role", "string?"),
            ("latency_ms", "Percentiles?"),
            ("used_memory", "integer?"),
            ("maxmemory", "integer?"),
            ("maxmemory_policy", "string?"),
            ("evicted_keys", "integer?"),
            ("connected_clients", "integer?"),
            ("replicas", "integer?"),
            ("replication_lag", "integer?"),
            ("slowlog", "object[]?"),
            ("degraded_since", "time?"),
            ("degraded_why", "string?"),
            ("problem", "string?"),
            ("instances", "integer?"),
            ("settlements_waiting", "integer?"),
        ],
    ),
    ("Percentiles", &[("p50", "number"), ("p90", "number"), ("p99", "number"), ("count", "integer")]),
    (
        "Question",
        &[
            ("user", "string?"),
            ("api_key", "string?"),
            ("model", "string"),
            ("endpoint", "string?"),
            ("ip", "string?"),
            ("user_agent", "string?"),
        ],
    ),
    (
        "Explanation",
        &[
            ("caller", "object"),
            ("model", "string?"),
            ("endpoint", "string"),
            ("allowed", "boolean"),
            ("refused", "object?"),
            ("ban", "object?"),
            ("providers", "object[]?"),
            ("rules", "object[]"),
        ],
    ),
    (
        "Instance",
        &[
            ("name", "string"),
            ("version", "string"),
            ("config_hash", "string"),
            ("control_version", "integer"),
            ("started", "time"),
            ("store", "string"),
            ("seen", "time"),
            ("self", "boolean"),
        ],
    ),
    ("Model", &[("name", "string"), ("providers", "Provider[]")]),
    (
        "Provider",
        &[
            ("name", "string"),
            ("healthy", "boolean"),
            ("drained", "boolean"),
            ("in_flight", "integer"),
            ("latency_ms", "Percentiles?"),
            ("first_token_ms", "Percentiles?"),
        ],
    ),
    (
        "Request",
        &[
            ("time", "time"),
            ("instance", "string"),
            ("request_id", "string"),
            ("method", "string"),
            ("endpoint", "string"),
            ("status", "integer"),
            ("outcome", "string"),
            ("code", "string?"),
            ("rule", "string?"),
            ("source", "string?"),
            ("user", "string?"),
            ("api_key", "string?"),
            ("ip", "string"),
            ("model", "string?"),
            ("provider", "string?"),
            ("fallback_model", "string?"),
            ("stream", "boolean"),
            ("prompt_tokens", "integer?"),
            ("completion_tokens", "integer?"),
            ("estimated", "boolean"),
            ("cost_micros", "integer?"),
            ("latency_ms", "number"),
            ("first_token_ms", "number?"),
            ("overhead_ms", "number?"),
        ],
    ),
    (
        "Figures",
        &[
            ("time", "time"),
            ("instance", "string"),
            ("version", "string"),
            ("started", "time"),
            ("state", "string"),
            ("requests", "RequestFigures"),
            ("tokens", "TokenFigures"),
            ("overhead_ms", "Spread?"),
            ("models", "ModelFigures[]"),
            ("limits", "Fullest[]"),
            ("limits_of", "string"),
            ("redis", "RedisFigures"),
            ("fleet", "FleetFigures?"),
            ("instances", "object[]"),
        ],
    ),
    (
        "RequestFigures",
        &[
            ("per_second", "number"),
            ("refused_per_second", "number"),
            ("failed_per_second", "number"),
            ("in_flight", "integer"),
            ("total", "integer"),
            ("refused", "integer"),
            ("failed", "integer"),
        ],
    ),
    (
        "TokenFigures",
        &[
            ("input_per_second", "number"),
            ("output_per_second", "number"),
            ("input", "integer"),
            ("output", "integer"),
        ],
    ),
    ("Spread", &[("p50", "number"), ("p95", "number"), ("count", "integer")]),
    (
        "ModelFigures",
        &[
            ("name", "string"),
            ("providers", "integer"),
            ("healthy", "integer"),
            ("in_flight", "integer"),
            ("requests_per_second", "number"),
            ("upstream_ms", "Spread?"),
            ("first_token_ms", "Spread?"),
        ],
    ),
    (
        "Fullest",
        &[
            ("key", "string"),
            ("rule", "string"),
            ("unit", "string"),
            ("used", "integer"),
            ("limit", "integer"),
            ("window", "string"),
            ("reset_ms", "integer"),
        ],
    ),
    ("RedisFigures", &[("enabled", "boolean"), ("connected", "boolean"), ("degraded", "boolean")]),
    (
        "FleetFigures",
        &[
            ("requests", "integer"),
            ("refused", "integer"),
            ("requests_per_second", "number?"),
            ("refused_per_second", "number?"),
        ],
    ),
    ("Lost", &[("requests", "integer")]),
    ("End", &[("reason", "string")]),
    ("Reason", &[("reason", "string?")]),
    (
        "Drain",
        &[
            ("model", "string"),
            ("provider", "string"),
            ("drained", "boolean"),
            ("reason", "string?"),
            ("created", "time"),
            ("version", "integer"),
        ],
    ),
    (
        "AuditRecord",
        &[
            ("id", "string"),
            ("time", "time"),
            ("version", "integer"),
            ("actor", "string"),
            ("address", "string"),
            ("action", "string"),
            ("subject", "string"),
            ("before", "any?"),
            ("after", "any?"),
        ],
    ),
    (
        "Configuration",
        &[
            ("status", "string"),
            ("config", "object"),
            ("origins", "object"),
            ("overrides", "string[]"),
            ("control_version", "integer"),
        ],
    ),
    (
        "Usage",
        &[
            ("start", "time"),
            ("end", "time"),
            ("user", "string?"),
            ("api_key", "string?"),
            ("team", "string?"),
            ("model", "string?"),
            ("requests", "integer"),
            ("refused", "integer"),
            ("estimated", "integer"),
            ("tokens", "Tokens"),
            ("cost", "number"),
        ],
    ),
    (
        "Tokens",
        &[
            ("input", "integer"),
            ("cached_input", "integer"),
            ("output", "integer"),
            ("reasoning", "integer"),
            ("total", "integer"),
        ],
    ),
    ("Checked", &[("ok", "boolean"), ("problems", "object[]")]),
    ("Reloaded", &[("status", "string"), ("message", "string"), ("problems", "object[]")]),
];

/// The document.
pub(super) fn document(routes: &[Route]) -> Value {
    let mut paths = Map::new();
    for route in routes {
        let path = paths.entry(path(route)).or_insert_with(|| json!({}));
        path[route.method] = operation(route);
    }
    let mut schemas: Map<String, Value> =
        SCHEMAS.iter().map(|(name, fields)| ((*name).to_owned(), object(fields))).collect();
    let event = ["Figures", "Request", "Lost", "End"].map(reference);
    schemas.insert("Event".to_owned(), json!({ "anyOf": event }));
    schemas.insert("Any".to_owned(), json!({}));
    schemas.insert("File".to_owned(), json!({ "type": "string", "description": "A configuration file." }));
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Tollgate's admin API", "version": env!("CARGO_PKG_VERSION") },
        "security": [{ "key": [] }, { "bearer": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": { "type": "apiKey", "in": "header", "name": "X-Admin-Key" },
                "bearer": { "type": "http", "scheme": "bearer" },
            },
            "schemas": schemas,
        },
    })
}

/// `{*name}` is a parameter like any other here.
fn path(route: &Route) -> String {
    route.path.replace("{*", "{")
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn operation(route: &Route) -> Value {
    let content = |schema: Value| json!({ "application/json": { "schema": schema } });
    let mut answer = json!({ "description": route.summary });
    match route.answer {
        Shape::Nothing => {}
        Shape::One(name) => answer["content"] = content(reference(name)),
        Shape::Events(name) => {
            answer["content"] = json!({ "text/event-stream": { "schema": reference(name) } });
        }
        Shape::Page(name) => {
            let page = json!({
                "type": "object",
                "required": ["data", "next_cursor"],
                "properties": { "data": { "type": "array", "items": reference(name) },
                                "next_cursor": { "type": ["string", "null"] } },
            });
            answer["content"] = content(page);
        }
    }
    if matches!(route.answer, Shape::One(name) if VERSIONED.contains(&name)) {
        answer["headers"] = json!({ "ETag": { "description": "The version of the record, for `If-Match`.",
                                              "schema": { "type": "string" } } });
    }
    if route.query.contains(&"format") {
        answer["content"]["text/csv"] = json!({ "schema": { "type": "string" } });
    }
    let problem = json!({ "description": "What is wrong.",
                          "content": { "application/problem+json": { "schema": reference("Problem") } } });
    let mut operation = json!({
        "summary": route.summary,
        "x-role": route.role.as_str(),
        "parameters": parameters(route),
        "responses": { (route.status.as_str()): answer, "default": problem },
    });
    if let Some(body) = route.body {
        let kind = if body == "File" { "text/plain" } else { "application/json" };
        operation["requestBody"] = json!({ "content": { (kind): { "schema": reference(body) } } });
    }
    operation
}

fn parameters(route: &Route) -> Vec<Value> {
    let path = path(route);
    let named = path.split('{').skip(1).filter_map(|rest| rest.split('}').next());
    let in_path = named
        .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }));
    let in_query = route.parameters().map(|name| {
        let kind = match name {
            "limit" => "integer",
            "dry_run" | "refused" | "requests" | "figures" => "boolean",
            _ => "string",
        };
        json!({ "name": name, "in": "query", "schema": { "type": kind } })
    });
    let in_header = route.conditional.then(|| {
        json!({ "name": "If-Match", "in": "header", "schema": { "type": "string" },
                "description": "The `ETag` it was decided on: 412 when that is no more." })
    });
    in_path.chain(in_query).chain(in_header).collect()
}

fn object(fields: &[(&str, &str)]) -> Value {
    let required: Vec<&str> =
        fields.iter().filter(|(_, kind)| !kind.ends_with('?')).map(|(name, _)| *name).collect();
    let properties: Map<String, Value> =
        fields.iter().map(|(name, kind)| ((*name).to_owned(), field(kind))).collect();
    json!({ "type": "object", "required": required, "properties": properties })
}

/// `string`, `Rate`; `…[]`, `…{}`, `…?`.
fn field(kind: &str) -> Value {
    if let Some(kind) = kind.strip_suffix('?') {
        return json!({ "anyOf": [field(kind), { "type": "null" }] });
    }
    if let Some(kind) = kind.strip_suffix("[]") {
        return json!({ "type": "array", "items": field(kind) });
    }
    if let Some(kind) = kind.strip_suffix("{}") {
        return json!({ "type": "object", "additionalProperties": field(kind) });
    }
    match kind {
        "any" => json!({}),
        "time" => json!({ "type": "string", "format": "date-time" }),
        "string" | "integer" | "number" | "boolean" | "object" => json!({ "type": kind }),
        name => reference(name),
    }
}

#[cfg(test)]
mod tests {
    use super::super::routes;
    use super::*;

    #[test]
    fn every_schema_that_is_named_is_there_and_every_one_is_named() {
        let document = document(&routes::all());
        let text = document.to_string();
        let named = |name: &str| text.contains(&format!("#/components/schemas/{name}\""));
        for reference in text.split("#/components/schemas/").skip(1) {
            let name = reference.split('"').next().unwrap_or_default();
            assert!(document["components"]["schemas"].get(name).is_some(), "there is no {name}");
        }
        for (name, _) in SCHEMAS {
            assert!(named(name), "nobody names {name}");
        }
    }
}
