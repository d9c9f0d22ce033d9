//! Every way of asking the admin API, in one table: the router is built from it, and so is its description.

use std::sync::Arc;

use axum::handler::Handler;
use axum::routing::{MethodRouter, delete, get, patch, post, put};
use http::StatusCode;

use super::{
    Reply, audit, bans, configuration, events, explain, instances, keys, limits, models, openapi, rate_limit,
    requests, stats, usage, users,
};
use crate::Gateway;
use crate::config::Role;

/// One method of one path.
pub(super) struct Route {
    /// `get`.
    pub(super) method: &'static str,
    /// As axum and OpenAPI write it, but for `{*name}`.
    pub(super) path: &'static str,
    /// One sentence.
    pub(super) summary: &'static str,
    /// The least that may ask.
    pub(super) role: Role,
    /// Parameters of the query, beside those of every list and every change.
    pub(super) query: &'static [&'static str],
    /// Whether it takes `If-Match`.
    pub(super) conditional: bool,
    /// Schema of the body; `None`: it takes none.
    pub(super) body: Option<&'static str>,
    /// What it answers with.
    pub(super) status: StatusCode,
    /// The answer.
    pub(super) answer: Shape,
    /// Where its handler is asked, which may be more than the path; `None`: the handler of another row sees to it.
    pub(super) mount: Option<&'static str>,
    /// What answers.
    pub(super) handler: MethodRouter<Arc<Gateway>>,
}

/// What an answer is made of.
#[derive(Clone, Copy)]
pub(super) enum Shape {
    /// No body.
    Nothing,
    /// One of this schema.
    One(&'static str),
    /// A page of those.
    Page(&'static str),
    /// Server-sent events whose data are these.
    Events(&'static str),
}

impl Route {
    fn new(
        (method, path): (&'static str, &'static str),
        handler: MethodRouter<Arc<Gateway>>,
        summary: &'static str,
        answer: Shape,
    ) -> Self {
        let role = if method == "get" { Role::Viewer } else { Role::Operator };
        let (query, body, status) = (&[][..], None, StatusCode::OK);
        let status = if matches!(answer, Shape::Nothing) { StatusCode::NO_CONTENT } else { status };
        let conditional = matches!(method, "put" | "patch" | "delete");
        Self {
            method,
            path,
            summary,
            role,
            query,
            conditional,
            body,
            status,
            answer,
            mount: Some(path),
            handler,
        }
    }

    fn get<H: Handler<T, Arc<Gateway>>, T: 'static>(
        path: &'static str,
        handler: H,
        summary: &'static str,
        answer: Shape,
    ) -> Self {
        Self::new(("get", path), get(handler), summary, answer)
    }

    fn post<H: Handler<T, Arc<Gateway>>, T: 'static>(
        path: &'static str,
        handler: H,
        summary: &'static str,
        answer: Shape,
    ) -> Self {
        Self::new(("post", path), post(handler), summary, answer)
    }

    fn put<H: Handler<T, Arc<Gateway>>, T: 'static>(
        path: &'static str,
        handler: H,
        summary: &'static str,
        answer: Shape,
    ) -> Self {
        Self::new(("put", path), put(handler), summary, answer)
    }

    fn patch<H: Handler<T, Arc<Gateway>>, T: 'static>(
        path: &'static str,
        handler: H,
        summary: &'static str,
        answer: Shape,
    ) -> Self {
        Self::new(("patch", path), patch(handler), summary, answer)
    }

    fn delete<H: Handler<T, Arc<Gateway>>, T: 'static>(
        path: &'static str,
        handler: H,
        summary: &'static str,
    ) -> Self {
        Self::new(("delete", path), delete(handler), summary, Shape::Nothing)
    }

    /// Only for who may do everything.
    fn for_admins(self) -> Self {
        Self { role: Role::Admin, ..self }
    }

    /// All parameters of the query: its own, and those of every list and every change.
    pub(super) fn parameters(&self) -> impl Iterator<Item = &'static str> + use<> {
        let usual: &[&str] = match (self.answer, self.method) {
            (Shape::Page(_), _) => &["limit", "cursor"],
            (_, "get") => &[],
            _ => &["dry_run"],
        };
        self.query.iter().chain(usual).copied()
    }

    /// It changes what is there, so it takes `If-Match`.
    fn conditional(self) -> Self {
        Self { conditional: true, ..self }
    }

    fn mounted(self, mount: Option<&'static str>) -> Self {
        Self { mount, ..self }
    }

    fn query(self, query: &'static [&'static str]) -> Self {
        Self { query, ..self }
    }

    fn takes(self, body: &'static str) -> Self {
        Self { body: Some(body), ..self }
    }

    fn created(self) -> Self {
        Self { status: StatusCode::CREATED, ..self }
    }
}

/// What may be asked of each mounted row, in their order: its own parameters, and those of the rows without a mount that
/// its handler sees to.
pub(super) fn asked(routes: &[Route]) -> Vec<Arc<[&'static str]>> {
    let same = |one: &Route, other: &Route| {
        let path = one.path.replace("{*", "{");
        other.mount.is_none() && one.method == other.method && other.path.starts_with(&path)
    };
    let mounted = routes.iter().filter(|route| route.mount.is_some());
    let asked = mounted.map(|one| {
        let others = routes.iter().filter(|other| same(one, other));
        one.parameters().chain(others.flat_map(Route::parameters)).collect()
    });
    asked.collect()
}

/// All of them.
pub(super) fn all() -> Vec<Route> {
    use Shape::{Events, One, Page};
    type R = Route;
    vec![
        R::get("/admin/keys", keys::list, "Keys, by id.", Page("Key")).query(&["user", "team"]),
        R::post("/admin/keys", keys::create, "Makes a key; it is shown once.", One("NewKey"))
            .takes("KeySettings")
            .created()
            .for_admins(),
        R::post("/admin/keys/import", keys::import, "Takes in hashes of keys, all or none.", One("Imported"))
            .takes("KeyImport")
            .created()
            .for_admins(),
        R::get("/admin/keys/{id}", keys::show, "One key.", One("Key")),
        R::patch("/admin/keys/{id}", keys::patch, "Changes what is named; null takes away.", One("Key"))
            .takes("KeySettings")
            .for_admins(),
        R::delete("/admin/keys/{id}", keys::delete, "Forgets a key.").for_admins(),
        R::post("/admin/keys/{id}/rotate", keys::rotate, "A new key in place of this one.", One("NewKey"))
            .takes("Rotation")
            .conditional()
            .for_admins(),
        R::post("/admin/keys/{id}/revoke", keys::revoke, "Refuses a key from now on.", One("Key"))
            .conditional()
            .for_admins(),
        R::get("/admin/users", users::list, "Users, by name.", Page("User")),
        R::post("/admin/users", users::create, "Adds a user.", One("User"))
            .takes("UserSettings")
            .created()
            .for_admins(),
        R::get("/admin/users/{name}", users::show, "One user.", One("User")),
        R::patch("/admin/users/{name}", users::patch, "Changes what is named; null takes away.", One("User"))
            .takes("UserSettings")
            .for_admins(),
        R::delete("/admin/users/{name}", users::delete, "Forgets a user.").for_admins(),
        R::get("/admin/bans", bans::list, "Bans, by id.", Page("Ban")).query(&["subject"]),
        R::post("/admin/bans", bans::create, "Lets somebody in no more.", One("Ban"))
            .takes("BanSettings")
            .conditional()
            .created(),
        R::get("/admin/bans/{id}", bans::show, "One ban.", One("Ban")),
        R::delete("/admin/bans/{id}", bans::delete, "Lifts a ban."),
        R::get("/admin/limits", limits::list, "The rules that hold, by name.", Page("Rule")),
        R::get("/admin/limits/{*name}", limits::show, "One rule.", One("Rule")),
        R::put("/admin/limits/{*name}", limits::put, "Sets a rule over those of the file.", One("Rule"))
            .takes("RuleSettings"),
        R::delete("/admin/limits/{*name}", limits::delete, "The file's rule holds again."),
        // The name of a rule may have slashes: what follows it is told apart by the handler.
        R::get(
            "/admin/limits/{name}/history",
            limits::show,
            "What operators made of a rule, the latest version first.",
            Page("LimitVersion"),
        )
        .mounted(None),
        R::post(
            "/admin/limits/{name}/rollback",
            limits::post,
            "What a version made of a rule holds again.",
            One("RolledBack"),
        )
        .mounted(Some("/admin/limits/{*name}"))
        .takes("Rollback")
        .conditional(),
        R::get("/admin/rate-limit/stats", stats::stats, "Totals, and the fullest limits.", One("Statistics"))
            .query(&["prefix", "limit", "cursor"]),
        R::put(
            "/admin/rate-limit/config",
            rate_limit::configure,
            "A limit per endpoint and address.",
            One("Configured"),
        )
        .takes("EndpointLimit"),
        R::post("/admin/rate-limit/clear", rate_limit::clear, "Forgets what a subject used.", One("Cleared"))
            .query(&["key"]),
        R::get("/admin/usage", usage::report, "What was used, by whom and when.", Page("Usage"))
            .query(&["by", "from", "to", "step", "user", "api_key", "team", "model", "format"]),
        R::get("/admin/redis/status", stats::redis, "How the shared store does.", One("RedisStatus")),
        R::get(
            "/admin/explain",
            explain::explain,
            "What a request would meet; spends nothing.",
            One("Explanation"),
        )
        .query(&["user", "api_key", "model", "endpoint", "ip", "user_agent"]),
        R::post("/admin/explain", explain::explain, "The same, asked with a body.", One("Explanation"))
            .takes("Question"),
        R::get("/admin/instances", instances::list, "The processes that share the limits.", Page("Instance")),
        R::get("/admin/models", models::list, "Who serves what, and how well.", Page("Model")),
        R::post(
            "/admin/models/{model}/providers/{provider}/drain",
            models::drain,
            "A provider gets no new requests.",
            One("Drain"),
        )
        .takes("Reason")
        .conditional(),
        R::delete(
            "/admin/models/{model}/providers/{provider}/drain",
            models::undrain,
            "A provider gets requests again.",
        ),
        R::get("/admin/requests", requests::list, "Those that ended last here.", Page("Request"))
            .query(requests::FILTERS),
        R::get("/admin/events", events::listen, "What happens now, as it happens.", Events("Event"))
            .query(events::PARAMETERS),
        R::get("/admin/audit", audit::list, "Who changed what, the latest first.", Page("AuditRecord")),
        R::get("/admin/config", configuration::show, "What is in force, with origins.", One("Configuration")),
        R::post("/admin/config/check", configuration::check, "Looks at a file.", One("Checked"))
            .takes("File"),
        R::post("/admin/config/reload", configuration::reload, "Reads the file again.", One("Reloaded"))
            .for_admins(),
        R::get("/admin/openapi.json", description, "This description.", One("Any")),
    ]
}

/// `GET /admin/openapi.json`
async fn description() -> Reply {
    Ok(super::ask::json(StatusCode::OK, &openapi::document(&all())))
}
