//! Callers that ask without a pause, whatever happens to the gateways, and note every answer.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{CHAT, Conn, Provider, Response, SOON, openai, question, request};

/// Longest wait for one answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Before a gateway that is not there is asked again, and between two looks at what can only be polled.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// One model, users with a key `sk-NAME` and a rule each: `("alice", "limit: 3/day")`.
pub fn users_config(provider: &Provider, url: &str, redis: &str, users: &[(&str, &str)]) -> String {
    let mut text = format!(
        "models: [{{ name: chat, providers: [{{ {} }}] }}]\nsettings: {{ instances: 4 }}\n\
         dependencies: {{ redis: {{ url: '{url}'{redis} }} }}\nusers:\n",
        openai(provider)
    );
    for (name, _) in users {
        text += &format!("  - {{ name: {name}, keys: [sk-{name}] }}\n");
    }
    text += "limits:\n";
    for (name, rule) in users {
        text += &format!("  - {{ name: {name}, match: {{ user: {name} }}, per: user, {rule} }}\n");
    }
    text
}

/// Where each gateway is; it may change.
pub type Doors = Arc<Mutex<Vec<SocketAddr>>>;

/// One answer, or that there was none.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    pub user: &'static str,
    /// Which gateway was asked.
    pub gateway: usize,
    pub sent: Instant,
    pub came: Instant,
    /// 0: the connection broke; 1: nothing came for [`PATIENCE`].
    pub status: u16,
    /// Who decided; empty: nobody says.
    pub source: &'static str,
    /// What the decision took, of requests that were admitted.
    pub decision: Option<Duration>,
    /// `x-ratelimit-reset`: of a fixed window its end by the store's clock, Unix seconds.
    pub reset: u64,
}

impl Answer {
    pub fn is_admitted(&self) -> bool {
        self.status == 200
    }

    /// Whether Redis decided, now or half a second ago.
    pub fn is_shared(&self) -> bool {
        matches!(self.source, "redis" | "denial_memory")
    }
}

/// Callers under way.
pub struct Callers {
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
    answers: Arc<Mutex<Vec<Answer>>>,
    gateways: usize,
}

impl Callers {
    /// At each gateway so many callers for each user, each with a pause between two requests.
    pub fn start(doors: &Doors, users: &[&'static str], each: usize, pause: Duration) -> Self {
        let (stop, answers) = (watch::Sender::new(false), Arc::<Mutex<Vec<Answer>>>::default());
        let gateways = doors.lock().expect("no test panics with it").len();
        let mut tasks = Vec::new();
        for &user in std::iter::repeat_n(users, each).flatten() {
            for gateway in 0..gateways {
                let (doors, answers, mut stopped) = (doors.clone(), answers.clone(), stop.subscribe());
                tasks.push(tokio::spawn(async move {
                    let mut conn = None;
                    while !*stopped.borrow() {
                        let answer = ask(&doors, gateway, user, &mut conn).await;
                        answers.lock().expect("no test panics with it").push(answer);
                        let pause = if answer.status == 0 { pause.max(LOOK_AGAIN) } else { pause };
                        // Paces the load; ends at once when told to.
                        let _ = tokio::time::timeout(pause, stopped.changed()).await;
                    }
                }));
            }
        }
        Self { stop, tasks, answers, gateways }
    }

    /// The answers after the first `skipped`.
    pub fn since(&self, skipped: usize) -> Vec<Answer> {
        self.answers.lock().expect("no test panics with it")[skipped..].to_vec()
    }

    /// How many answers there are.
    pub fn count(&self) -> usize {
        self.answers.lock().expect("no test panics with it").len()
    }

    /// Waits until what has come after the first `skipped` answers is as wanted.
    pub async fn until(&self, what: &str, skipped: usize, wanted: impl Fn(&[Answer]) -> bool) {
        let started = Instant::now();
        while !wanted(&self.since(skipped)) {
            assert!(started.elapsed() < SOON, "{what}: not within {SOON:?}");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until every gateway has given this user an answer, asked for from `since` on, that is as wanted; how long
    /// after `since` the last of them came.
    pub async fn all(
        &self,
        what: &str,
        user: &str,
        since: Instant,
        wanted: impl Fn(&Answer) -> bool,
    ) -> Duration {
        let skipped = self.since(0).partition_point(|answer| answer.came < since);
        let first = |answers: &[Answer], gateway: usize| {
            let of = |answer: &&Answer| {
                answer.gateway == gateway && answer.user == user && answer.sent >= since && wanted(answer)
            };
            answers.iter().find(of).map(|answer| answer.came - since)
        };
        let started = Instant::now();
        loop {
            let answers = self.since(skipped);
            let times: Option<Vec<Duration>> =
                (0..self.gateways).map(|gateway| first(&answers, gateway)).collect();
            if let Some(times) = times {
                return times.into_iter().max().unwrap_or_default();
            }
            assert!(started.elapsed() < SOON, "{what}: not within {SOON:?}");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Lets all end with the answer they wait for; every answer.
    pub async fn stop(self) -> Vec<Answer> {
        self.stop.send_replace(true);
        for task in self.tasks {
            task.await.expect("callers do not panic");
        }
        self.answers.lock().expect("no test panics with it").clone()
    }
}

async fn ask(doors: &Doors, gateway: usize, user: &'static str, conn: &mut Option<Conn>) -> Answer {
    let sent = Instant::now();
    let address = doors.lock().expect("no test panics with it")[gateway];
    let asked = async {
        if conn.is_none() {
            *conn = Some(Conn::try_open(address).await?);
        }
        let conn = conn.as_mut().expect("it was opened");
        let key = format!("Bearer sk-{user}");
        let headers = [("Authorization", key.as_str()), ("Content-Type", "application/json")];
        conn.send_what_goes(&request("POST", CHAT, &headers, question(false).as_bytes())).await?;
        conn.try_response().await
    };
    let answered = tokio::time::timeout(PATIENCE, asked).await;
    let mut answer =
        Answer { user, gateway, sent, came: Instant::now(), status: 0, source: "", decision: None, reset: 0 };
    match answered {
        Ok(Ok(response)) => read(&mut answer, &response),
        Ok(Err(_)) => *conn = None,
        Err(_) => {
            answer.status = 1;
            *conn = None;
        }
    }
    answer
}

fn read(answer: &mut Answer, response: &Response) {
    const SOURCES: [&str; 6] = ["redis", "denial_memory", "share", "open", "closed", "memory"];
    answer.status = response.status;
    let said = response.header("x-tollgate-source").unwrap_or_default();
    answer.source = SOURCES.into_iter().find(|source| *source == said).unwrap_or_default();
    answer.reset =
        response.header("x-ratelimit-reset").and_then(|seconds| seconds.parse().ok()).unwrap_or_default();
    answer.decision = response.header("server-timing").and_then(|timing| {
        let millis: f64 = timing.strip_prefix("limit;dur=")?.split(',').next()?.parse().ok()?;
        Some(Duration::from_secs_f64(millis / 1_000.0))
    });
}

/// What was decided in one fixed window.
#[derive(Clone, Debug)]
pub struct Window {
    /// Its end, Unix seconds of the store.
    pub end: u64,
    pub admitted: u64,
    pub refused: u64,
    /// When its first request was sent, and its last answer came.
    pub from: Instant,
    pub to: Instant,
    /// Redis decided all of it.
    pub shared: bool,
    /// Redis decided nothing of it.
    pub alone: bool,
}

/// The fixed windows of a user, in order of time.
pub fn windows(answers: &[Answer], user: &str) -> Vec<Window> {
    let mut windows = std::collections::BTreeMap::<u64, Window>::new();
    for answer in answers.iter().filter(|answer| answer.user == user && answer.reset > 0) {
        let window = windows.entry(answer.reset).or_insert_with(|| Window {
            end: answer.reset,
            admitted: 0,
            refused: 0,
            from: answer.sent,
            to: answer.came,
            shared: true,
            alone: true,
        });
        *(if answer.is_admitted() { &mut window.admitted } else { &mut window.refused }) += 1;
        window.from = window.from.min(answer.sent);
        window.to = window.to.max(answer.came);
        window.shared &= answer.is_shared();
        window.alone &= !answer.is_shared();
    }
    windows.into_values().collect()
}
