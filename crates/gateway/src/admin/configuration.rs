//! `/admin/config`: what is in force, a look at something else, and reading it again.

use axum::extract::State;
use http::StatusCode;
use serde_json::{Value, json};

use super::ask::json;
use super::problem::Problem;
use super::{Ask, Reply, Shared};
use crate::config::{self, Severity};
use crate::reload::{self, Refused};

/// `GET /admin/config`: the configuration with all defaults, secrets masked, where each value comes from, and the names of
/// rules that operators set over it.
pub(super) async fn show(State(gateway): Shared) -> Reply {
    let now = gateway.snapshot.load_full();
    let over = now.control.limits.iter().filter(|(_, limit)| limit.value.holds());
    let over: Vec<&String> = over.map(|(name, _)| name).collect();
    let answer = json!({ "status": "success", "config": now.effective["config"],
                         "origins": now.effective["origins"], "overrides": over,
                         "control_version": now.control.version });
    Ok(json(StatusCode::OK, &answer))
}

/// `POST /admin/config/check` with a file as the body: what is wrong with it, and with it under what operators have said.
/// Nothing is taken from it, and nothing told of what variables hold.
pub(super) async fn check(State(gateway): Shared, ask: Ask) -> Reply {
    let text = std::str::from_utf8(&ask.body)
        .map_err(|_| Problem::new(StatusCode::BAD_REQUEST, "the body is no UTF-8"))?
        .to_owned();
    let look = move || reload::check(&gateway, "body", &text);
    let checked = tokio::task::spawn_blocking(look).await;
    let checked =
        checked.map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let (ok, problems) = match checked {
        Ok(warnings) => (true, warnings),
        Err(problems) => (false, problems),
    };
    Ok(json(StatusCode::OK, &json!({ "ok": ok, "problems": shown(&problems) })))
}

/// `POST /admin/config/reload`: the file is read again; a bad one changes nothing.
pub(super) async fn reload(State(gateway): Shared, ask: Ask) -> Reply {
    let Some(source) = gateway.source.clone() else {
        return Err(Problem::conflict("this gateway was started without a configuration to read again"));
    };
    let done = match ask.is_dry_run()? {
        true => {
            let holder = gateway.clone();
            let loading = tokio::task::spawn_blocking(move || source.load_for(&holder)).await;
            let loading = loading
                .map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
            loading.map(|loaded| loaded.warnings)
        }
        false => reload::again(&gateway, &source).await,
    };
    match done {
        Ok(warnings) => {
            let answer = json!({ "status": "success", "message": "Configuration reloaded",
                                 "problems": shown(&warnings) });
            Ok(json(StatusCode::OK, &answer))
        }
        Err(Refused::Faulty(problems)) => {
            Err(Problem::fields(problems.into_iter().map(Into::into).collect()))
        }
        Err(unreadable) => Err(Problem::conflict(unreadable.to_string())),
    }
}

fn shown(problems: &[config::Problem]) -> Vec<Value> {
    let shown = problems.iter().map(|problem| {
        let severity = if problem.severity == Severity::Error { "error" } else { "warning" };
        json!({ "severity": severity, "file": problem.file, "line": problem.line, "col": problem.col,
                "path": problem.path, "message": problem.message, "help": problem.help })
    });
    shown.collect()
}
