use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::stream;
use http_body_util::{BodyExt, Either, Full, StreamBody};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::super::guard::{Exchange, Limits};
use super::*;

type Answer = Reply<super::super::guard::Held<Either<Full<Bytes>, Pieces>>>;
type Pieces = StreamBody<Pin<Box<dyn futures_util::Stream<Item = Result<Frame<Bytes>, io::Error>> + Send>>>;

/// How long `/slow` takes.
const SLOW: Duration = Duration::from_secs(5);

/// Counts those that are dropped unfinished.
struct Dropped(Arc<AtomicUsize>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// What the path asks for; else the method, the path and an echo of the body.
async fn respond(
    request: Request<RequestBody<DuplexStream>>,
    exchange: Arc<Mutex<Option<Exchange>>>,
    left: Arc<AtomicUsize>,
) -> Answer {
    let Request { head, body } = request;
    let pieces = |pieces: Vec<Result<&'static str, io::Error>>| {
        let frames = pieces.into_iter().map(|piece| piece.map(|text| Frame::data(Bytes::from(text))));
        Either::Right(StreamBody::new(Box::pin(stream::iter(frames)) as Pin<Box<_>>))
    };
    let whole = |text: String| Either::Left(Full::new(Bytes::from(text)));
    let mut status = 200;
    let answer = match head.target.path() {
        "/never" => {
            let _dropped = Dropped(left);
            std::future::pending().await
        }
        "/slow" => {
            sleep(SLOW).await;
            whole("slow".to_owned())
        }
        "/unread" => whole("unread".to_owned()),
        "/pieces" => pieces(vec![Ok("one"), Ok(""), Ok("three")]),
        "/broken" => pieces(vec![Ok("half"), Err(io::ErrorKind::Other.into())]),
        "/empty" => {
            status = 204;
            whole(String::new())
        }
        _ => match body.collect().await {
            Ok(body) => {
                let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
                let query = head.target.query().map(|query| format!("?{query}")).unwrap_or_default();
                let named =
                    head.fields.get("named").map(|name| format!("{} ", String::from_utf8_lossy(name)));
                let named = named.unwrap_or_default();
                whole(format!("{} {}{query} {named}{body}", head.method, head.target.path()))
            }
            Err(error) => whole(format!("{error:?}")),
        },
    };
    let status = http::StatusCode::from_u16(status).unwrap();
    Reply { status, fields: Default::default(), body: taken(&exchange).hold(answer) }
}

fn taken(exchange: &Mutex<Option<Exchange>>) -> Exchange {
    exchange.lock().unwrap().take().expect("one for each request")
}

/// As requests end with the process: they look whether it ends when they are polled, and are not woken for it.
async fn unless(
    ending: CancellationToken,
    exchange: Arc<Mutex<Option<Exchange>>>,
    answering: impl Future<Output = Answer>,
) -> Answer {
    let mut answering = pin!(answering);
    poll_fn(|cx| match answering.as_mut().poll(cx) {
        Poll::Pending if ending.is_cancelled() => {
            let body = taken(&exchange).hold(Either::Left(Full::new(Bytes::from("ending"))));
            Poll::Ready(Reply { status: http::StatusCode::OK, fields: Default::default(), body })
        }
        polled => polled,
    })
    .await
}

struct Served {
    client: DuplexStream,
    connection: JoinHandle<io::Result<()>>,
    left: Arc<AtomicUsize>,
    closing: CancellationToken,
    ending: CancellationToken,
}

fn connect() -> Served {
    let (client, server) = duplex(256 << 10);
    let refuse = |violation: &Violation| Bytes::from(format!("HTTP/1.1 400 Refused\r\n\r\n{violation}"));
    let mut guard = Guard::new(server, Limits::default(), Arc::new(refuse));
    let (exchanges, closing) = (guard.exchanges(), CancellationToken::new());
    let left = Arc::new(AtomicUsize::new(0));
    let ending = CancellationToken::new();
    let (until, end, counted) = (closing.clone(), ending.clone(), left.clone());
    let connection = tokio::spawn(async move {
        let mut received = BytesMut::new();
        let speaks = greeting(&mut guard, &mut received, &until).await;
        assert_ne!(speaks, Some(Speaks::Http2));
        let answer = |request| {
            let exchange = Arc::new(Mutex::new(Some(exchanges.begin())));
            let answering = respond(request, exchange.clone(), counted.clone());
            Box::pin(unless(end.clone(), exchange, answering))
        };
        if speaks.is_some() { serve(guard, received, &until, &end, answer).await } else { Ok(()) }
    });
    Served { client, connection, left, closing, ending }
}

impl Served {
    async fn send(&mut self, bytes: &str) {
        self.client.write_all(bytes.as_bytes()).await.unwrap();
    }

    /// What has come when nothing more does, without the dates.
    async fn said(&mut self) -> String {
        let mut all = Vec::new();
        let mut some = vec![0; 64 << 10];
        // Time is paused: this is when everybody waits.
        while let Ok(Ok(bytes @ 1..)) = timeout(Duration::from_millis(1), self.client.read(&mut some)).await {
            all.extend_from_slice(&some[..bytes]);
        }
        let text = String::from_utf8(all).unwrap();
        let lines = text.split_inclusive("\r\n").filter(|line| !line.starts_with("date: "));
        lines.collect()
    }
}

/// What is said to these bytes, and whether the connection is still there.
async fn said_to(bytes: &str) -> (String, bool) {
    let mut served = connect();
    served.send(bytes).await;
    let said = served.said().await;
    sleep(Duration::from_millis(10)).await;
    (said, !served.connection.is_finished())
}

const GET: &str = "GET /a HTTP/1.1\r\nHost: a\r\n\r\n";

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

#[tokio::test(start_paused = true)]
async fn answers_are_framed_as_the_caller_knows_it() {
    let close = "connection: close\r\n";
    for (request, answer, stays) in [
        (GET.to_owned(), ok("GET /a "), true),
        (GET.repeat(3), ok("GET /a ").repeat(3), true),
        (GET.replace("GET", "HEAD"), "HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n".into(), true),
        (GET.replace("/a", "/empty"), "HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n".into(), true),
        (GET.replace("/a", "http://b/c?d"), ok("GET /c?d "), true),
        (format!("\r\n\r\n{GET}"), ok("GET /a "), true),
        (
            GET.replace("/a", "/pieces"),
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n5\r\nthree\r\n0\r\n\r\n".into(),
            true,
        ),
        (
            GET.replace("/a", "/pieces").replace("1.1", "1.0"),
            format!("HTTP/1.0 200 OK\r\n{close}\r\nonethree"),
            false,
        ),
        (
            GET.replace("1.1", "1.0"),
            format!("HTTP/1.0 200 OK\r\ncontent-length: 7\r\n{close}\r\nGET /a "),
            false,
        ),
        (
            GET.replace("1.1\r\n", "1.0\r\nConnection: Keep-Alive\r\n"),
            "HTTP/1.0 200 OK\r\ncontent-length: 7\r\nconnection: keep-alive\r\n\r\nGET /a ".into(),
            true,
        ),
        (
            GET.replace("/a", "/pieces").replace("1.1\r\n", "1.0\r\nConnection: Keep-Alive\r\n"),
            format!("HTTP/1.0 200 OK\r\n{close}\r\nonethree"),
            false,
        ),
        (
            GET.replace("1.1\r\n", "1.1\r\nConnection: x, Close\r\n") + GET,
            format!("HTTP/1.1 200 OK\r\ncontent-length: 7\r\n{close}\r\nGET /a "),
            false,
        ),
    ] {
        assert_eq!(said_to(&request).await, (answer, stays), "{request:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn requests_are_the_same_however_they_are_cut() {
    let chunks = "POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n2\r\nde\r\n0\r\nT: r\r\n\r\n";
    let length = "POST /l HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nabcd";
    // Between them empty lines, and a method that begins like the preface of HTTP/2.
    let named = "\r\nPRI /n HTTP/1.1\r\nHost: a\r\nNamed:  x y\t\r\n\r\n";
    let requests = [chunks, length, named, GET, "\r\n\r\n", length, chunks].concat();
    let [c, l, n] = ["POST /c abcde", "POST /l abcd", "PRI /n x y "].map(ok);
    let wanted = [&c, &l, &n, &ok("GET /a "), &l, &c].map(String::as_str).concat();
    assert_eq!(said_to(&requests).await, (wanted.clone(), true));
    for cut in 1..requests.len() {
        let mut served = connect();
        served.send(&requests[..cut]).await;
        let first = served.said().await;
        served.send(&requests[cut..]).await;
        assert_eq!(first + &served.said().await, wanted, "cut at {cut}");
    }
    let mut served = connect();
    let mut said = String::new();
    for byte in requests.chars() {
        served.send(&byte.to_string()).await;
        said += &served.said().await;
    }
    assert_eq!(said, wanted);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_waits_is_told_when_its_body_is_wanted() {
    let head = |path: &str| {
        format!("POST {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n")
    };
    let mut served = connect();
    served.send(&head("/a")).await;
    assert_eq!(served.said().await, "HTTP/1.1 100 Continue\r\n\r\n");
    served.send(&format!("hi{GET}")).await;
    assert_eq!(served.said().await, ok("POST /a hi") + &ok("GET /a "));
    // Whoever does not wait is not told; one whose body nobody wants may send it or not.
    assert_eq!(said_to(&(head("/a") + "hi")).await.0, ok("POST /a hi"));
    let (answer, stays) = said_to(&head("/unread")).await;
    assert!(answer.ends_with("connection: close\r\n\r\nunread"), "{answer}");
    let (answer, _) = said_to(&(head("/a").replace("1.1", "1.0") + "hi")).await;
    assert!(answer.starts_with("HTTP/1.0 200 OK") && answer.ends_with("POST /a hi"), "{answer}");
    assert!(stays, "it lingers");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_nobody_reads_is_not_the_next_request() {
    let short = format!("POST /unread HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{GET}", GET.len());
    assert_eq!(said_to(&(short.clone() + GET)).await, (ok("unread") + &ok("GET /a "), true));
    let (head, body) = short.split_at(short.len() - GET.len());
    let mut served = connect();
    served.send(head).await;
    let answer = served.said().await;
    assert!(answer.contains("connection: close"), "what is still to come is not waited for: {answer}");
    served.send(body).await;
    served.send(GET).await;
    assert_eq!(served.said().await, "");
    let long =
        format!("POST /unread HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n{}", "x".repeat(200_000));
    assert!(said_to(&(long + GET)).await.0.ends_with("connection: close\r\n\r\nunread"));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_breaks_off_is_not_ended() {
    let (answer, stays) = said_to(&(GET.replace("/a", "/broken") + GET)).await;
    assert_eq!(answer, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n");
    assert!(!stays);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_takes_its_request_along() {
    let mut served = connect();
    served.send(&GET.replace("/a", "/never")).await;
    sleep(Duration::from_secs(100)).await;
    assert_eq!(served.left.load(Ordering::SeqCst), 0);
    drop(served.client);
    assert!(served.connection.await.unwrap().is_err());
    assert_eq!(served.left.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn closing_ends_what_is_idle_and_the_answer_under_way_is_the_last() {
    for begun in ["", "G", "GET /a HTTP/1.1\r\nHost: a\r\n", GET] {
        let mut served = connect();
        served.send(begun).await;
        served.said().await;
        served.closing.cancel();
        sleep(Duration::from_secs(2)).await;
        assert!(served.connection.is_finished(), "{begun:?}");
    }
    let mut served = connect();
    served.send("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n1").await;
    sleep(Duration::from_secs(1)).await;
    served.closing.cancel();
    sleep(Duration::from_secs(1)).await;
    served.send(&format!("2{GET}")).await;
    let answer = served.said().await;
    assert_eq!(answer, "HTTP/1.1 200 OK\r\ncontent-length: 10\r\nconnection: close\r\n\r\nPOST /a 12");
}

#[tokio::test(start_paused = true)]
async fn whichever_request_it_is_it_is_polled_when_the_process_ends() {
    for before in 0..3 {
        let mut served = connect();
        for _ in 0..before {
            served.send(GET).await;
            assert_eq!(served.said().await, ok("GET /a "));
        }
        served.send(&GET.replace("/a", "/never")).await;
        assert_eq!(served.said().await, "");
        served.ending.cancel();
        assert_eq!(served.said().await, ok("ending"), "after {before}");
        // It is polled once for that, and goes on where it does not wait.
        served.send(GET).await;
        assert_eq!(served.said().await, ok("GET /a "));
    }
}

#[tokio::test(start_paused = true)]
async fn what_waits_behind_a_request_does_not_end_it() {
    let gate = "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n";
    let chunks = "POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    // A later request turns out to be none while the first is served.
    let mut served = connect();
    served.send(&GET.replace("/a", "/slow")).await;
    served.send(chunks).await;
    assert_eq!(served.said().await, "");
    served.send("nonsense").await;
    assert_eq!(served.said().await, "");
    sleep(SLOW).await;
    let refused = served.said().await;
    let refused = refused.strip_prefix(&ok("slow")).unwrap_or_else(|| panic!("{refused}"));
    assert!(refused.ends_with("close\r\n\r\nMalformed(\"The chunked body is malformed.\")"), "{refused}");
    // As small as requests can be, as many as one sends at once.
    let small = "G / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n";
    let count = 3 * READ_BYTES / small.len();
    let mut served = connect();
    served.send(&GET.replace("/a", "/slow")).await;
    served.send(&small.repeat(count)).await;
    assert_eq!(served.said().await, "");
    sleep(SLOW).await;
    assert_eq!(served.said().await.matches("\r\n\r\nG / ").count(), count);
    served.send(&format!("{gate}1")).await;
    assert_eq!(served.said().await, ok("POST /a 1"));
}

#[tokio::test(start_paused = true)]
async fn what_is_no_uri_is_refused_and_nothing_behind_it_served() {
    for target in ["http://", "http:///a"] {
        let request = GET.replace("/a", target);
        let (answer, _) = said_to(&(GET.to_owned() + &request + GET)).await;
        let refusal = format!("{}HTTP/1.1 400 Refused\r\n\r\n{}", ok("GET /a "), Violation::RequestLine);
        assert_eq!(answer, refusal, "{target}");
    }
}

/// Takes so many bytes and no more.
struct Narrow(usize);

impl AsyncWrite for Narrow {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let taken = bytes.len().min(self.0);
        self.0 -= taken;
        if taken == 0 { Poll::Pending } else { Poll::Ready(Ok(taken)) }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// However small the pieces and however often it is woken: a body is not asked for more than one piece beyond those that
/// wait to be written.
#[tokio::test]
async fn who_does_not_read_holds_the_body_back() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let pieces = stream::repeat_with(move || {
        count.fetch_add(1, Ordering::SeqCst);
        Ok::<_, io::Error>(Frame::data(Bytes::from_static(b"data: {}\n\n")))
    });
    let body = StreamBody::new(Box::pin(pieces) as Pin<Box<dyn futures_util::Stream<Item = _> + Send>>);
    let terms = Terms { http_1_1: true, head_only: false, persists: true };
    let reply = Reply { status: http::StatusCode::OK, fields: Default::default(), body };
    let mut sending = Sending::new(reply, &terms, true, &mut Date::default(), BytesMut::new());
    let mut socket = Narrow(50);
    for _ in 0..1_000 {
        let polled = poll_fn(|cx| Poll::Ready(sending.poll(cx, &mut socket))).await;
        assert!(polled.is_pending());
    }
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    socket.0 = 1_000;
    assert!(poll_fn(|cx| Poll::Ready(sending.poll(cx, &mut socket))).await.is_pending());
    assert!((20..100).contains(&asked.load(Ordering::SeqCst)), "{asked:?}");
}
