//! The verbs that speak to the admin API of a running gateway: what they do there, what they print, how they exit.

mod support;

use std::net::SocketAddr;
use std::process::Output;

use serde_json::Value;
use support::{Provider, Tollgate, json_answer, post, question, refusing, request};

const CONFIG: &str = "users: [{ name: alice, tier: free, keys: [sk-alice] }]\n\
                      tiers: { free: { per: user, limit: 100/day } }\n\
                      models: [{ name: chat, providers: [{ type: simulated }] }]\n";

async fn start() -> Tollgate {
    Tollgate::start_with("  admin_key: sesame\n", CONFIG, &[]).await
}

/// What a verb said, and how it exited.
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Said {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {} {}", self.out, self.err))
    }

    /// The cells of the line that begins with this one.
    fn row(&self, first: &str) -> String {
        let line = self.out.lines().find(|line| line.split_whitespace().next() == Some(first));
        line.unwrap_or_else(|| panic!("no {first} in {} {}", self.out, self.err)).to_owned()
    }
}

async fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Said {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.args(arguments).env_clear().envs(environment.iter().copied());
    let ran = tokio::task::spawn_blocking(move || command.output()).await;
    let Output { status, stdout, stderr } = ran.expect("no panic").expect("the binary runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Said { code: status.code(), out: text(stdout), err: text(stderr) }
}

/// Asks a gateway of [`start`].
async fn ask(gateway: &Tollgate, arguments: &[&str]) -> Said {
    let url = format!("http://{}", gateway.admin);
    run(arguments, &[("TOLLGATE_URL", &url), ("TOLLGATE_ADMIN_KEY", "sesame")]).await
}

/// The same, which must succeed.
async fn done(gateway: &Tollgate, arguments: &[&str]) -> Said {
    let said = ask(gateway, arguments).await;
    assert_eq!(said.code, Some(0), "{arguments:?}: {}{}", said.out, said.err);
    said
}

/// The same, which must be answered with no: exit 1, nothing on standard output, and why on standard error.
async fn refused(gateway: &Tollgate, arguments: &[&str], why: &str) {
    let said = ask(gateway, arguments).await;
    assert_eq!((said.code, said.out.as_str()), (Some(1), ""), "{arguments:?}: {}", said.err);
    assert!(said.err.contains(why), "{arguments:?}: {}", said.err);
}

/// The status of a chat request with a key.
async fn chat(address: SocketAddr, key: &str) -> u16 {
    let bearer = format!("Bearer {key}");
    let headers = [("Authorization", bearer.as_str())];
    let question = question(false);
    post(address, &request("POST", "/v1/chat/completions", &headers, question.as_bytes())).await.status
}

#[tokio::test]
async fn a_key_is_made_rotated_and_revoked() {
    let gateway = start().await;
    let tried = done(&gateway, &["keys", "create", "--user", "alice", "--dry-run"]).await;
    assert!(!tried.out.contains("tg_") && tried.err.contains("nothing was changed"), "{}", tried.out);

    // Made for `KEY=$(…)`: one line, the secret.
    let limit = ["--limit", "2/day", "--limit", "1k tokens/day", "--metadata", "ticket=OPS-1"];
    let made =
        done(&gateway, &[&["keys", "create", "--user", "alice", "--quiet"], &limit[..]].concat()).await;
    let key = made.out.trim_end_matches('\n').to_owned();
    assert!(key.starts_with("tg_") && key.len() == 61 && made.err.is_empty(), "{} {}", made.out, made.err);
    assert_eq!(chat(gateway.data, &key).await, 200);
    let id = &key[3..11];

    let listed = done(&gateway, &["keys", "list"]).await;
    assert!(listed.out.starts_with("ID"), "{}", listed.out);
    let row = listed.row(id);
    assert!(row.contains("alice") && row.contains("active") && row.contains("2/day, 1k tokens/day"), "{row}");
    assert!(!listed.out.contains(&key[12..]), "{}", listed.out);
    let others = done(&gateway, &["keys", "list", "--user", "bob", "--json"]).await.json();
    assert_eq!(others["data"], Value::Array(Vec::new()));
    let shown = done(&gateway, &["keys", "show", id, "--json"]).await.json();
    assert_eq!((&shown["id"], &shown["metadata"]["ticket"]), (&id.into(), &"OPS-1".into()));
    assert!(shown["key"].is_null(), "{shown}");

    let rotated = done(&gateway, &["keys", "rotate", id, "--overlap", "1h", "--json"]).await.json();
    let new = rotated["key"].as_str().expect("a key");
    assert_ne!(new, key);
    assert_eq!((chat(gateway.data, new).await, chat(gateway.data, &key).await), (200, 429), "both are known");
    let again = done(&gateway, &["keys", "rotate", id]).await;
    assert!(again.row("key").contains("tg_") && again.out.contains("shown this once"), "{}", again.out);
    assert_eq!(chat(gateway.data, &key).await, 401);

    done(&gateway, &["keys", "revoke", id, "--dry-run"]).await;
    assert!(done(&gateway, &["keys", "list"]).await.row(id).contains("active"));
    assert!(done(&gateway, &["keys", "revoke", id]).await.row("status").contains("revoked"));
    assert!(done(&gateway, &["keys", "show", id]).await.row("status").contains("revoked"));
    refused(&gateway, &["keys", "rotate", id], "is revoked").await;
    refused(&gateway, &["keys", "show", "nobody"], "there is no key").await;
    refused(&gateway, &["keys", "create", "--user", "bob"], "user: there is no user").await;
}

#[tokio::test]
async fn a_list_of_many_pages_is_one_list() {
    let gateway = start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keys.json");
    let path = file.to_str().expect("UTF-8").to_owned();
    for numbers in [0..1_000, 1_000..1_005] {
        // An id is the beginning of a hash.
        let key = |number| format!(r#"{{"hash":"sha256:{number:012x}{number:052x}","user":"alice"}}"#);
        let keys: Vec<String> = numbers.map(key).collect();
        std::fs::write(&file, format!("[{}]", keys.join(","))).expect("it can be written");
        let dry = done(&gateway, &["keys", "import", &path, "--dry-run", "--json"]).await.json();
        let taken = done(&gateway, &["keys", "import", &path, "--json"]).await.json();
        assert_eq!((&taken["imported"], &dry["imported"]), (&keys.len().into(), &keys.len().into()));
    }
    let all = done(&gateway, &["keys", "list", "--json"]).await.json();
    assert_eq!(all["data"].as_array().map(Vec::len), Some(1_005));
    assert_eq!(done(&gateway, &["keys", "list"]).await.out.lines().count(), 1_006);

    refused(&gateway, &["keys", "import", &path], "keys[0].hash: this key is there already").await;
    std::fs::write(&file, "tg_no_json").expect("it can be written");
    for path in [path.as_str(), "/nowhere/keys.json"] {
        let said = ask(&gateway, &["keys", "import", path]).await;
        assert_eq!(said.code, Some(2), "{}", said.err);
        assert!(said.err.contains(path), "{}", said.err);
    }
}

#[tokio::test]
async fn limits_are_set_shown_cleared_and_deleted() {
    let gateway = start().await;
    let rules = done(&gateway, &["limits", "list"]).await;
    assert!(rules.out.starts_with("NAME") && rules.row("free").contains("file"), "{}", rules.out);

    let set = ["limits", "set", "tight", "--limit", "1/day", "--per", "user", "--match", "user=alice"];
    let more = ["--strategy", "token_bucket", "--expires-in", "1h"];
    done(&gateway, &[&set[..], &more, &["--dry-run"]].concat()).await;
    refused(&gateway, &["limits", "show", "tight"], "there is no limit `tight`").await;
    let made = done(&gateway, &[&set[..], &more].concat()).await;
    assert!(
        made.row("limit").contains("token_bucket") && made.row("match").contains("user=alice"),
        "{}",
        made.out
    );
    let shown = done(&gateway, &["limits", "show", "tight", "--json"]).await.json();
    assert_eq!((&shown["source"], &shown["per"]), (&"admin".into(), &"user".into()));
    assert!(shown["expires"].is_string(), "{shown}");

    assert_eq!((chat(gateway.data, "sk-alice").await, chat(gateway.data, "sk-alice").await), (200, 429));
    let cleared = done(&gateway, &["limits", "clear", "rate_limit:user:alice", "--dry-run"]).await;
    assert!(cleared.out.contains("would clear") && cleared.err.contains("dry run"), "{}", cleared.out);
    assert_eq!(chat(gateway.data, "sk-alice").await, 429);
    let cleared = done(&gateway, &["limits", "clear", "user:alice", "--json"]).await.json();
    assert_eq!(cleared["existed"], true);
    assert_eq!(chat(gateway.data, "sk-alice").await, 200);
    refused(&gateway, &["limits", "clear", "alice"], "key: is no subject").await;

    let shadow = done(&gateway, &[&set[..], &["--shadow"]].concat()).await;
    assert!(shadow.row("shadow").contains("true"), "{}", shadow.out);
    assert_eq!(chat(gateway.data, "sk-alice").await, 200);
    let deny = ["limits", "set", "shut", "--deny", "--match", "user=alice", "--match", "user=bob"];
    refused(&gateway, &deny, "match.user").await;
    done(
        &gateway,
        &["limits", "set", "shut", "--deny", "--match", "user=alice", "--match", "authenticated=true"],
    )
    .await;
    assert_eq!(chat(gateway.data, "sk-alice").await, 403);
    assert!(done(&gateway, &["limits", "list"]).await.row("shut").contains("deny"));
    for name in ["shut", "tight"] {
        done(&gateway, &["limits", "delete", name]).await;
        refused(&gateway, &["limits", "delete", name], "there is no limit").await;
    }
    assert_eq!(chat(gateway.data, "sk-alice").await, 200);
    refused(&gateway, &["limits", "delete", "free"], "is in the file").await;
    refused(&gateway, &["limits", "set", "bad", "--limit", "60/fortnight", "--per", "user"], "limit").await;
}

#[tokio::test]
async fn a_limit_whose_name_is_a_path_is_found() {
    let gateway = start().await;
    let name = "endpoint:/v1/chat/completions";
    done(&gateway, &["limits", "set", name, "--limit", "5/minute", "--per", "endpoint,ip"]).await;
    let shown = done(&gateway, &["limits", "show", name, "--json"]).await.json();
    assert_eq!((&shown["name"], &shown["limits"][0]["limit"]), (&name.into(), &5.into()));
    done(&gateway, &["limits", "delete", name]).await;
}

#[tokio::test]
async fn bans_are_added_listed_and_removed() {
    let gateway = start().await;
    let add = ["bans", "add", "user:alice", "--reason", "leaked key"];
    done(&gateway, &[&add[..], &["--dry-run"]].concat()).await;
    assert_eq!(chat(gateway.data, "sk-alice").await, 200);
    let made = done(&gateway, &[&add[..], &["--expires-in", "1h", "--json"]].concat()).await.json();
    assert!(made["until"].is_string(), "{made}");
    assert_eq!(chat(gateway.data, "sk-alice").await, 403);
    done(&gateway, &["bans", "add", "ip:2001:db8::1", "--reason", "scans"]).await;

    let listed = done(&gateway, &["bans", "list"]).await;
    assert!(listed.out.starts_with("ID") && listed.out.contains("leaked key"), "{}", listed.out);
    assert!(listed.out.contains("for ever"), "{}", listed.out);
    let one = done(&gateway, &["bans", "list", "--subject", "ip:2001:db8::2", "--json"]).await.json();
    assert_eq!(one["data"][0]["subject"], "network:2001:db8::/64", "an address of the same network");

    done(&gateway, &["bans", "remove", "user:alice", "--dry-run"]).await;
    assert_eq!(chat(gateway.data, "sk-alice").await, 403);
    done(&gateway, &["bans", "remove", "user:alice"]).await;
    assert_eq!(chat(gateway.data, "sk-alice").await, 200);
    refused(&gateway, &["bans", "remove", "user:alice"], "there is no ban of `user:alice`").await;
    let id = one["data"][0]["id"].as_str().expect("an id");
    let removed = done(&gateway, &["bans", "remove", id, "--json"]).await.json();
    assert_eq!(removed["removed"], *id);
    refused(&gateway, &["bans", "remove", id], "there is no ban").await;
    assert_eq!(done(&gateway, &["bans", "list"]).await.out.lines().count(), 1);
}

#[tokio::test]
async fn usage_is_told_as_columns_json_and_csv() {
    let gateway = start().await;
    for key in ["sk-alice", "sk-alice", "sk-nobody"] {
        chat(gateway.data, key).await;
    }
    let logged = gateway.requests_logged(3).await;
    let tokens = support::tokens_of(&logged);
    let told = done(&gateway, &["usage"]).await;
    assert!(told.out.starts_with("START") && told.out.lines().count() == 3, "{}", told.out);
    let line = told.out.lines().find(|line| line.contains("alice")).expect("a line of hers");
    let cells: Vec<&str> = line.split_whitespace().skip(2).collect();
    assert_eq!((&cells[..3], cells[7]), (&["alice", "2", "0"][..], "0.000000"), "{line}");
    assert_eq!(cells[6], tokens.to_string());
    let nobody = told.out.lines().find(|line| line.contains(" - ")).expect("a line of nobody's");
    assert!(nobody.contains("1         1"), "{nobody}");

    let query = ["usage", "--by", "model", "--step", "hour", "--user", "alice", "--json"];
    let listed = done(&gateway, &query).await.json();
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(1), "{listed}");
    assert_eq!((&listed["data"][0]["model"], &listed["data"][0]["requests"]), (&"chat".into(), &2.into()));

    let csv =
        done(&gateway, &["usage", "--csv", "--from", "2026-01-01", "--step", "day", "--team", ""]).await;
    assert!(
        csv.out.starts_with("start,end,user,requests,") && csv.out.ends_with("0.000000\r\n"),
        "{:?}",
        csv.out
    );
    assert_eq!(csv.out.lines().count(), 3, "{}", csv.out);
    refused(&gateway, &["usage", "--from", "soon"], "from: `soon` is not a date").await;
    refused(&gateway, &["usage", "--csv", "--to", "1999-01-01"], "from: ").await;
}

#[tokio::test]
async fn what_cannot_be_asked_is_69_and_says_what_to_look_at() {
    let gateway = start().await;
    let admin = format!("http://{}", gateway.admin);
    let data = format!("http://{}", gateway.data);
    let (_socket, gone) = refusing();
    let gone = format!("http://{gone}");
    let page = Provider::answering(json_answer("200 OK", "", "<html>")).await;
    let page = format!("http://{}", page.address);
    let flood = Provider::answering(json_answer("200 OK", "", &" ".repeat(17 << 20))).await;
    let flood = format!("http://{}", flood.address);
    for (url, key, why) in [
        (&flood, "sesame", "more than 16777216 bytes"),
        (&gone, "sesame", "cannot be asked: "),
        (&admin, "", "the admin key is missing; set TOLLGATE_ADMIN_KEY"),
        (&admin, "open", "the admin key is wrong; look at TOLLGATE_ADMIN_KEY"),
        (&data, "sesame", "is it the admin address"),
        (&page, "sesame", "no JSON"),
    ] {
        let environment = [("TOLLGATE_URL", url.as_str()), ("TOLLGATE_ADMIN_KEY", key)];
        let said = run(&["keys", "list"], &environment).await;
        assert_eq!((said.code, said.out.as_str()), (Some(69), ""), "{url}: {}", said.err);
        assert!(said.err.contains(why) && said.err.contains(url.as_str()), "{why}: {}", said.err);
        assert!(key.is_empty() || !said.err.contains(key), "{}", said.err);
    }
    // What is said on the command line comes before the environment.
    let arguments = ["bans", "list", "--url", &admin, "--admin-key", "sesame"];
    let said = run(&arguments, &[("TOLLGATE_URL", &gone), ("TOLLGATE_ADMIN_KEY", "open")]).await;
    assert_eq!(said.code, Some(0), "{}", said.err);
}

#[tokio::test]
async fn wrong_usage_is_2_before_anybody_is_asked() {
    for arguments in [
        &["keys"][..],
        &["keys", "show", ""],
        &["keys", "list", "--url", "127.0.0.1:8081"],
        &["keys", "list", "--url", "ftp://127.0.0.1"],
        &["keys", "list", "--admin-key", "a\nb"],
        &["keys", "create", "--metadata", "ticket"],
        &["keys", "create", "--quiet", "--json"],
        &["keys", "create", "--quiet", "--dry-run"],
        &["keys", "create", "--expires", "2030-01-01", "--expires-in", "1h"],
        &["limits", "set", "x"],
        &["limits", "set", "x", "--limit", "1/s", "--deny"],
        &["limits", "set", "x", "--limit", "1/s", "--match", "user"],
        &["bans", "add", "user:alice"],
        &["bans", "add", "alice", "--reason", "x"],
        &["bans", "remove", "ip:localhost"],
        &["usage", "--by", "ip"],
        &["usage", "--step", "week"],
        &["usage", "--csv", "--json"],
    ] {
        let said = run(arguments, &[]).await;
        assert_eq!((said.code, said.out.as_str()), (Some(2), ""), "{arguments:?}: {}", said.err);
        assert!(!said.err.is_empty(), "{arguments:?}");
    }
}

/// The verbs that the help of some words names.
async fn verbs_of(words: &[&str]) -> Vec<String> {
    let help = run(&[words, &["--help"]].concat(), &[]).await;
    assert_eq!(help.code, Some(0), "{words:?}: {}", help.err);
    let lines = help.out.lines().skip_while(|line| *line != "Commands:").skip(1);
    let named = lines.take_while(|line| !line.is_empty());
    named.filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect()
}

#[tokio::test]
async fn the_documentation_names_every_verb_and_no_other() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/cli.md");
    let page = std::fs::read_to_string(page).expect("the page");
    let mut there = Vec::new();
    for verb in verbs_of(&[]).await {
        let under = verbs_of(&[&verb]).await;
        there.extend(under.iter().map(|other| format!("{verb} {other}")));
        there.push(verb);
    }
    assert!(there.len() > 15, "{there:?}");
    for verb in &there {
        assert!(page.contains(&format!("tollgate {verb}")), "docs/cli.md does not name `{verb}`");
    }
    for rest in page.split("tollgate ").skip(1) {
        let is_word = |word: &&str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase());
        let words: Vec<&str> = rest.split([' ', '\n', '`', ')']).take(2).take_while(is_word).collect();
        let Some(first) = words.first() else { continue };
        assert!(there.iter().any(|verb| verb == first), "docs/cli.md names `{}`", words.join(" "));
        let has_verbs = there.iter().any(|verb| verb.starts_with(&format!("{first} ")));
        let is_known = || there.contains(&words.join(" "));
        assert!(!has_verbs || words.len() < 2 || is_known(), "docs/cli.md names `{}`", words.join(" "));
    }
}
