//! `explain`: every rule a request would meet, what it says, where it is defined. Spends nothing.

use std::process::ExitCode;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use serde_json::Value;

use super::client::Connection;
use super::table::{cell, table};
use super::{Outcome, exit};

#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    connection: Connection,
    /// Who would ask. Without a user and a key: somebody without a key.
    #[arg(long, conflicts_with = "key_id", value_parser = NonEmptyStringValueParser::new())]
    user: Option<String>,
    /// The id of the key that would be used.
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    key_id: Option<String>,
    /// For which model.
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    model: String,
    /// At which endpoint. Default: `/v1/chat/completions`.
    #[arg(long, value_name = "PATH")]
    endpoint: Option<String>,
    /// From which address. Default: the one this is asked from.
    #[arg(long)]
    ip: Option<String>,
    /// With which `User-Agent`, which is part of a session.
    #[arg(long, value_name = "TEXT")]
    user_agent: Option<String>,
}

pub(super) fn run(options: &Options) -> Outcome {
    let admin = options.connection.open()?;
    let named = [
        ("user", options.user.as_deref()),
        ("api_key", options.key_id.as_deref()),
        ("model", Some(options.model.as_str())),
        ("endpoint", options.endpoint.as_deref()),
        ("ip", options.ip.as_deref()),
        ("user_agent", options.user_agent.as_deref()),
    ];
    let query: Vec<(&str, &str)> =
        named.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    let said = admin.find(&["explain"], &query)?;
    admin.print(&said, text)?;
    Ok(if said["allowed"] == true { ExitCode::SUCCESS } else { ExitCode::from(exit::NO) })
}

/// The verdict, and a line for each limit of each rule.
fn text(said: &Value) -> String {
    let rules = said["rules"].as_array().map_or(&[][..], Vec::as_slice);
    let rows = rules.iter().flat_map(|rule| {
        let defined = cell(&rule["defined"]);
        let limits = rule["limits"].as_array().map_or(&[][..], Vec::as_slice);
        match limits {
            [] => vec![whole(rule, defined)],
            limits => limits.iter().map(|limit| one(limit, defined.clone())).collect(),
        }
    });
    let names = ["RULE", "UNIT", "LIMIT", "USED", "REMAINING", "VERDICT", "DEFINED"];
    format!("{}\n\n{}", verdict(said), table(&names, rows))
}

/// `admitted: user alice, key 32a642c5fd76, tier pro, from 127.0.0.1, model demo at /v1/chat/completions`
fn verdict(said: &Value) -> String {
    let caller = &said["caller"];
    let known = [("user", "user"), ("api_key", "key"), ("team", "team"), ("tier", "tier"), ("ip", "from")];
    let known = known.into_iter().filter(|(field, _)| !caller[field].is_null());
    let mut who: Vec<String> =
        known.map(|(field, name)| format!("{name} {}", cell(&caller[field]))).collect();
    who.push(format!("model {} at {}", cell(&said["model"]), cell(&said["endpoint"])));
    let who = who.join(", ");
    match &said["refused"] {
        Value::Null => format!("admitted: {who}"),
        refused => {
            let wait = refused["retry_after_ms"].as_u64();
            let wait = wait.map(|wait| format!("; there is room in {}", seconds(wait))).unwrap_or_default();
            format!("refused: {who}\n{}: {}{wait}", cell(&refused["code"]), cell(&refused["why"]))
        }
    }
}

/// A rule that has no limit here: it denies, it limits nothing, or it is not met.
fn whole(rule: &Value, defined: String) -> Vec<String> {
    let verdict = match (rule["matches"] == true, rule["deny"] == true) {
        (true, true) => "refuses".to_owned(),
        (true, false) => "unlimited".to_owned(),
        (false, _) => format!("not met: {}", cell(&rule["why_not"])),
    };
    let nothing = || "-".to_owned();
    vec![cell(&rule["name"]), nothing(), nothing(), nothing(), nothing(), verdict, defined]
}

fn one(limit: &Value, defined: String) -> Vec<String> {
    let full = match (limit["remaining"].as_u64(), limit["retry_after_ms"].as_u64()) {
        (Some(1..), None) => None,
        (_, Some(wait)) => Some(format!("full, room in {}", seconds(wait))),
        (_, None) => Some("full".to_owned()),
    };
    let verdict = match (full, limit["shadow"] == true) {
        (None, _) => "has room".to_owned(),
        (Some(full), false) => full,
        (Some(full), true) => format!("{full}; only counts"),
    };
    let quota = match &limit["window"] {
        Value::Null => cell(&limit["limit"]),
        window => format!("{}/{}", cell(&limit["limit"]), cell(window)),
    };
    let [rule, unit, used, remaining] = ["rule", "unit", "used", "remaining"].map(|name| cell(&limit[name]));
    vec![rule, unit, quota, used, remaining, verdict, defined]
}

/// Milliseconds as people say them: `12 s`, `5 min`.
fn seconds(millis: u64) -> String {
    match millis.div_ceil(1_000) {
        short @ ..=120 => format!("{short} s"),
        long @ ..=7_200 => format!("{} min", long.div_ceil(60)),
        longer => format!("{} h", longer.div_ceil(3_600)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_kind_of_rule_has_its_line() {
        let limit = |remaining: u64, retry: Value, shadow: bool| {
            json!({ "rule": "r-requests-minute", "unit": "requests", "limit": 10, "window": "minute",
                    "used": 10 - remaining, "remaining": remaining, "retry_after_ms": retry, "shadow": shadow })
        };
        let rule = |name: &str, matches: bool, deny: bool, limits: Value| {
            json!({ "name": name, "defined": "tollgate.yml:3:5", "matches": matches, "deny": deny,
                    "why_not": "`user` is bob, the rule is for alice", "limits": limits })
        };
        let said = json!({
            "allowed": false,
            "caller": { "user": "bob", "api_key": "abc", "ip": "192.0.2.1", "team": null },
            "model": "chat", "endpoint": "/v1/chat/completions",
            "refused": { "code": "rate_limit_exceeded", "why": "no room", "retry_after_ms": 11_001 },
            "rules": [
                rule("r", true, false, json!([limit(3, Value::Null, false), limit(0, json!(11_001), false),
                                              limit(0, json!(300_000), true), limit(0, Value::Null, false)])),
                rule("other", false, false, json!([])),
                rule("shut", true, true, json!([])),
                rule("free", true, false, json!([])),
            ],
        });
        let expected = "\
refused: user bob, key abc, from 192.0.2.1, model chat at /v1/chat/completions
rate_limit_exceeded: no room; there is room in 12 s

RULE               UNIT      LIMIT      USED  REMAINING  VERDICT                                        DEFINED
r-requests-minute  requests  10/minute  7     3          has room                                       tollgate.yml:3:5
r-requests-minute  requests  10/minute  10    0          full, room in 12 s                             tollgate.yml:3:5
r-requests-minute  requests  10/minute  10    0          full, room in 5 min; only counts               tollgate.yml:3:5
r-requests-minute  requests  10/minute  10    0          full                                           tollgate.yml:3:5
other              -         -          -     -          not met: `user` is bob, the rule is for alice  tollgate.yml:3:5
shut               -         -          -     -          refuses                                        tollgate.yml:3:5
free               -         -          -     -          unlimited                                      tollgate.yml:3:5";
        assert_eq!(text(&said), expected);
    }
}
