//! Who listens to `GET /admin/events`.

use serde_json::Value;
use tokio::net::TcpStream;

use super::client::find;
use super::{Conn, Tollgate, request, soon};

/// Someone who listens.
pub struct Listener {
    pub conn: Conn,
    read: Vec<u8>,
}

impl Listener {
    pub async fn open(gateway: &Tollgate, query: &str) -> Self {
        Self::with_key(gateway, query, "").await
    }

    pub async fn with_key(gateway: &Tollgate, query: &str, key: &str) -> Self {
        Self::begin(Conn::open(gateway.admin).await, query, key).await
    }

    /// On a connection that is there.
    pub async fn on(stream: TcpStream, query: &str) -> Self {
        Self::begin(Conn::on(stream), query, "").await
    }

    async fn begin(mut conn: Conn, query: &str, key: &str) -> Self {
        let path = format!("/admin/events{query}");
        conn.send(&request("GET", &path, &[("X-Admin-Key", key)], b"")).await;
        let head = conn.head().await;
        assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")), "{head:?}");
        let mut this = Self { conn, read: Vec::new() };
        // What comes first is a comment: then somebody listens.
        assert!(this.next_raw().await.is_some_and(|first| first.starts_with(": ")));
        this
    }

    /// The next event as it is written; `None`: the body ended as it should.
    pub async fn next_raw(&mut self) -> Option<String> {
        soon("an event", async {
            loop {
                if let Some(end) = find(&self.read, b"\n\n") {
                    let event = self.read.drain(..end + 2).collect();
                    return Some(String::from_utf8(event).expect("UTF-8"));
                }
                match self.conn.data().await.expect("the body goes on") {
                    Some(data) => self.read.extend(data),
                    None => {
                        assert!(self.read.is_empty(), "half an event");
                        return None;
                    }
                }
            }
        })
        .await
    }

    /// Name and data of the next event.
    pub async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            let raw = self.next_raw().await?;
            if raw.starts_with(':') {
                continue;
            }
            let (name, data) = raw.trim_end().split_once('\n').expect("two lines");
            let data = data.strip_prefix("data: ").expect("data");
            let name = name.strip_prefix("event: ").expect("a name").to_owned();
            return Some((name, serde_json::from_str(data).expect("JSON")));
        }
    }

    /// The next event of this name.
    pub async fn next_of(&mut self, wanted: &str) -> Value {
        loop {
            let (name, data) = self.next().await.expect("it goes on");
            if name == wanted {
                return data;
            }
        }
    }
}
