use super::super::http1::{self, Speaks};
use super::super::rewound::Rewound;
use super::*;
use crate::error::BodyError;
use crate::relay::Reply;
use crate::request::{Request, Target};
use bytes::BytesMut;
use futures_util::FutureExt;
use http::Response;
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Either, Full, StreamBody};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use proptest::prelude::*;
use std::convert::Infallible;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A server of one connection, and what it counted.
struct Served {
    connection: JoinHandle<Result<(), Failure>>,
    served: Arc<AtomicUsize>,
    refused: Arc<AtomicUsize>,
}

impl Served {
    fn counts(&self) -> (usize, usize) {
        (self.served.load(Ordering::SeqCst), self.refused.load(Ordering::SeqCst))
    }
}

/// Who reads and writes through the guard.
#[derive(Clone, Copy, Debug)]
enum Server {
    Ours,
    /// Of which we know that it is used by many.
    Hyper,
}

fn serve<S>(socket: S, limits: Limits) -> Served
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    serve_by(Server::Ours, socket, limits)
}

fn serve_by<S>(server: Server, socket: S, limits: Limits) -> Served
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (served, refused) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let refusals = Arc::clone(&refused);
    let answer: Answer = Arc::new(move |violation| {
        refusals.fetch_add(1, Ordering::SeqCst);
        let body = format!("{{\"error\":\"{violation}\"}}");
        let (status, length) = (violation.status(), body.len());
        let head =
            format!("HTTP/1.1 {status} Refused\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
        Bytes::from(head + &body)
    });
    let mut guard = Guard::new(socket, limits, answer);
    let (exchanges, calls) = (guard.exchanges(), Arc::clone(&served));
    let begin = move || {
        calls.fetch_add(1, Ordering::SeqCst);
        exchanges.begin()
    };
    let connection = tokio::spawn(async move {
        let (closing, mut received) = (CancellationToken::new(), BytesMut::new());
        let speaks = match server {
            Server::Hyper => Some(None),
            Server::Ours => http1::greeting(&mut guard, &mut received, &closing).await.map(Some),
        };
        match speaks {
            None => return Ok(()),
            Some(None) => {
                let service =
                    service_fn(|request| respond(Request::from(request), begin()).map(Ok::<_, Infallible>));
                let builder = hyper::server::conn::http1::Builder::new();
                builder.serve_connection(TokioIo::new(guard), service).await?;
            }
            Some(Some(Speaks::Http1)) => {
                let answer = |request| Box::pin(respond(request, begin()).map(Reply::from));
                http1::serve(guard, received, &closing, &CancellationToken::new(), answer).await?;
            }
            Some(Some(Speaks::Http2)) => {
                let service =
                    service_fn(|request| respond(Request::from(request), begin()).map(Ok::<_, Infallible>));
                let socket = TokioIo::new(Rewound::new(received.freeze(), guard));
                let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                builder.serve_connection(socket, service).await?;
            }
        }
        Ok(())
    });
    Served { connection, served, refused }
}

/// What the path asks for; else an echo.
async fn respond<B: Body<Data = Bytes, Error: std::fmt::Debug>>(
    request: Request<B>,
    mut exchange: Exchange,
) -> Response<impl Body<Data = Bytes, Error: Into<Failure>> + Unpin> {
    let Request { head, body } = request;
    let text = match head.target.path() {
        "/slow" => {
            sleep(Duration::from_secs(1000)).await;
            Bytes::from("slow")
        }
        "/late" => {
            tokio::spawn(async move {
                let _late = exchange;
                sleep(Duration::from_secs(200)).await;
            });
            return Response::new(Either::Left(Full::default()));
        }
        "/large" => Bytes::from(vec![b'x'; 1024 * 1024]),
        "/until" => {
            exchange.until(Instant::now() + Duration::from_secs(10));
            let frames = futures_util::stream::unfold((), |()| async move {
                Some((Ok::<_, Infallible>(Frame::data(Bytes::from(vec![b'x'; 16 * 1024]))), ()))
            });
            let body = exchange.hold(Either::Left(Either::Left(StreamBody::new(Box::pin(frames)))));
            return Response::new(Either::Right(body));
        }
        "/unread" => Bytes::from("unread"),
        "/paused" => {
            let frames = futures_util::stream::unfold(0, |count| async move {
                sleep(Duration::from_secs(200)).await;
                (count < 3).then(|| (Ok::<_, Infallible>(Frame::data(Bytes::from("."))), count + 1))
            });
            let body = exchange.hold(Either::Left(Either::Right(StreamBody::new(Box::pin(frames)))));
            return Response::new(Either::Right(body));
        }
        _ => match body.collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => Bytes::from(format!("{error:?}")),
        },
    };
    Response::new(Either::Right(exchange.hold(Either::Right(Full::new(text)))))
}

fn connect(limits: Limits) -> (DuplexStream, Served) {
    let (client, server) = duplex(64 * 1024);
    (client, serve(server, limits))
}

async fn read_all(client: &mut (impl AsyncRead + Unpin)) -> String {
    let mut all = Vec::new();
    // Where time is paused, a connection that would never end fails at once.
    let read = timeout(Duration::from_secs(3600), client.read_to_end(&mut all)).await;
    read.expect("an end").expect("an orderly end");
    String::from_utf8(all).expect("text")
}

/// One response with a Content-Length.
async fn read_response(client: &mut (impl AsyncRead + Unpin)) -> String {
    let mut response = String::new();
    loop {
        response.push(char::from(client.read_u8().await.expect("a response")));
        let Some((head, body)) = response.split_once("\r\n\r\n") else {
            continue;
        };
        let (_, length) = head.split_once("content-length: ").expect("a length");
        let length: usize = length.split("\r\n").next().unwrap().parse().expect("a number");
        if body.len() == length {
            return response;
        }
    }
}

async fn exchange_all(bytes: &[u8]) -> (String, (usize, usize)) {
    let (mut client, served) = connect(Limits::default());
    client.write_all(bytes).await.unwrap();
    let answer = read_all(&mut client).await;
    (answer, served.counts())
}

#[tokio::test(start_paused = true)]
async fn both_framings_in_either_order_are_answered_400_and_never_served() {
    for lines in
        ["Content-Length: 3\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 3"]
    {
        let request = format!("POST / HTTP/1.1\r\nHost: a\r\n{lines}\r\n\r\n0\r\n\r\n");
        let (answer, counts) = exchange_all(request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 Refused\r\n"), "{answer}");
        assert!(answer.ends_with(&format!("{{\"error\":\"{}\"}}", Violation::LengthAndCoding)), "{answer}");
        assert_eq!(counts, (0, 1), "{lines}");
    }
}

/// However it is cut, and so also when the server has the beginning already.
#[tokio::test(start_paused = true)]
async fn the_guard_answers_before_the_server_does() {
    let bad = b"GET / HTTP/1.1\r\nHost : a\r\n\r\n";
    for at in 1..bad.len() {
        let (mut client, served) = connect(Limits::default());
        client.write_all(&bad[..at]).await.unwrap();
        sleep(Duration::from_millis(1)).await;
        client.write_all(&bad[at..]).await.unwrap();
        let answer = read_all(&mut client).await;
        assert!(answer.contains("white space before its colon"), "cut at {at}: {answer}");
        assert_eq!(served.counts(), (0, 1), "cut at {at}");
    }
}

#[tokio::test(start_paused = true)]
async fn good_requests_before_a_bad_one_are_answered_first() {
    let bad = b"GET / HTTP/1.1\r\n\r\n";
    let (answer, counts) = exchange_all(&[GET, GET, bad, GET].concat()).await;
    let statuses: Vec<&str> =
        answer.lines().filter_map(|line| line.strip_prefix("HTTP/1.1 ")).map(|rest| &rest[..3]).collect();
    assert_eq!(statuses, ["200", "200", "400"], "{answer}");
    assert_eq!(counts, (2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_waits_for_the_answer_under_way() {
    let (mut client, served) = connect(Limits::default());
    client.write_all(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    sleep(Duration::from_secs(1)).await;
    client.write_all(b"\n").await.unwrap();
    sleep(Duration::from_secs(500)).await;
    assert_eq!(served.counts(), (1, 0));
    let (seconds, answer) = end_of(&mut client).await;
    assert_eq!(seconds, 499);
    let (first, second) = answer.split_once("slow").expect("the first answer");
    assert!(first.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(second.starts_with("HTTP/1.1 400 Refused\r\n"), "{answer}");
    assert_eq!(served.counts(), (1, 1));
}

/// The service is done with the request, but the server is not.
#[tokio::test(start_paused = true)]
async fn a_refusal_waits_for_an_answer_not_wholly_written() {
    let (mut client, served) = connect(Limits::default());
    client.write_all(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    sleep(Duration::from_secs(1)).await;
    client.write_all(b"\n").await.unwrap();
    sleep(Duration::from_secs(20)).await;
    assert_eq!(served.counts(), (1, 0));
    let (_, answer) = end_of(&mut client).await;
    assert_eq!(answer.split("HTTP/1.1 400").next().unwrap().matches('x').count(), 1024 * 1024);
    assert_eq!(served.counts(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_bad_body_in_service_is_answered_by_the_service() {
    let (mut client, served) = connect(Limits::default());
    client.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n").await.unwrap();
    sleep(Duration::from_secs(1)).await;
    client.write_all(b"abc").await.unwrap();
    let answer = read_all(&mut client).await;
    let chunk = BodyError::Malformed(Violation::Chunk.to_string());
    assert!(answer.ends_with(&format!("{chunk:?}")), "{answer}");
    assert_eq!(served.counts(), (1, 0));
}

/// The time at which the connection ends, in seconds, and what it said.
async fn end_of(client: &mut DuplexStream) -> (u64, String) {
    let start = Instant::now();
    let answer = read_all(client).await;
    (start.elapsed().as_secs(), answer)
}

#[tokio::test(start_paused = true)]
async fn silence_on_a_new_connection_is_closed() {
    let (mut client, _served) = connect(Limits::default());
    assert_eq!(end_of(&mut client).await, (5, String::new()));
    let (mut client, _served) = connect(Limits::default());
    client.write_all(b"\r\n").await.unwrap();
    assert_eq!(end_of(&mut client).await, (5, String::new()));
}

#[tokio::test(start_paused = true)]
async fn a_slow_head_is_answered_408() {
    let (client, served) = connect(Limits::default());
    let (mut reader, mut writer) = tokio::io::split(client);
    let trickle = tokio::spawn(async move {
        for byte in GET.iter().cycle() {
            if writer.write_all(&[*byte]).await.is_err() {
                return;
            }
            sleep(Duration::from_secs(3)).await;
        }
    });
    let start = Instant::now();
    let answer = read_response(&mut reader).await;
    assert_eq!(start.elapsed().as_secs(), 10);
    assert!(answer.starts_with("HTTP/1.1 408 Refused\r\n"), "{answer}");
    assert!(answer.contains("10s after its first byte"), "{answer}");
    // The trickle does not hold the socket beyond the linger time.
    assert_eq!(read_all(&mut reader).await, "");
    let _ = served.connection.await;
    assert_eq!(start.elapsed().as_secs(), 11);
    trickle.abort();
}

#[tokio::test(start_paused = true)]
async fn every_head_has_its_own_time() {
    let (mut client, served) = connect(Limits::default());
    for _ in 0..5 {
        client.write_all(&GET[..9]).await.unwrap();
        sleep(Duration::from_secs(8)).await;
        client.write_all(&[&GET[9..], &GET[..9]].concat()).await.unwrap();
        read_response(&mut client).await;
        sleep(Duration::from_secs(8)).await;
        client.write_all(&GET[9..]).await.unwrap();
        read_response(&mut client).await;
    }
    assert_eq!(served.counts(), (10, 0));
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_75_seconds_after_its_last_answer() {
    let (mut client, served) = connect(Limits::default());
    for _ in 0..3 {
        client.write_all(GET).await.unwrap();
        read_response(&mut client).await;
        sleep(Duration::from_secs(70)).await;
    }
    client.write_all(GET).await.unwrap();
    read_response(&mut client).await;
    assert_eq!(end_of(&mut client).await, (75, String::new()));
    assert_eq!(served.counts(), (4, 0));
}

#[tokio::test(start_paused = true)]
async fn an_exchange_that_ends_after_its_answer_does_not_keep_the_connection() {
    let (mut client, _served) = connect(Limits::default());
    client.write_all(b"GET /late HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let (seconds, _) = end_of(&mut client).await;
    assert!((200 + 75..=200 + 2 * 75).contains(&seconds), "{seconds}");
}

#[tokio::test(start_paused = true)]
async fn an_idle_time_shorter_than_the_others_holds() {
    let limits = Limits { idle: Duration::from_secs(3), ..Limits::default() };
    let (mut client, _served) = connect(limits);
    client.write_all(GET).await.unwrap();
    read_response(&mut client).await;
    assert_eq!(end_of(&mut client).await, (3, String::new()));
}

#[tokio::test(start_paused = true)]
async fn no_read_timer_runs_while_an_answer_is_under_way() {
    for path in ["/slow", "/paused"] {
        let (mut client, _served) = connect(Limits::default());
        client.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\nGET").as_bytes()).await.unwrap();
        let (seconds, answer) = end_of(&mut client).await;
        let answered = if path == "/slow" { 1000 } else { 800 };
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{path}: {answer}");
        // Then the head begun during it has its time, and the lingering close.
        assert!(answer.contains("HTTP/1.1 408"), "{path}: {answer}");
        assert_eq!(seconds, answered + 10, "{path}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_fails_the_connection() {
    let (mut client, served) = connect(Limits::default());
    client.write_all(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut some = vec![0; 100 * 1024];
    sleep(Duration::from_secs(50)).await;
    client.read_exact(&mut some).await.unwrap();
    // Progress: the time runs anew.
    let start = Instant::now();
    let error = served.connection.await.unwrap().expect_err("a stalled write");
    assert!(format!("{error:?}").contains("took nothing of the answer for 60s"), "{error:?}");
    assert_eq!(start.elapsed().as_secs(), 60);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_its_answer_in_drops_does_not_outlast_its_deadline() {
    // With bytes behind the request the server does not read during the answer; without, it does.
    for behind in ["", "GET"] {
        let (mut client, served) = connect(Limits::default());
        client.write_all(format!("GET /until HTTP/1.1\r\nHost: a\r\n\r\n{behind}").as_bytes()).await.unwrap();
        let start = Instant::now();
        let taking = tokio::spawn(async move {
            let (mut drop, mut taken) = ([0; 1024], 0);
            // Progress each second, so that no write stalls.
            while client.read_exact(&mut drop).await.is_ok() {
                taken += drop.len();
                sleep(Duration::from_secs(1)).await;
            }
            taken
        });
        // Orderly or not: what was not sent was not sent.
        let _ = served.connection.await.unwrap();
        assert_eq!(start.elapsed().as_secs(), 12, "{behind:?}: the deadline and the grace");
        assert!(taking.await.unwrap() < 512 * 1024, "{behind:?}: cut");
    }
}

#[tokio::test]
async fn an_answer_reaches_a_client_that_is_still_sending() {
    let limits = Limits { linger: Duration::from_secs(600), ..Limits::default() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    for request in
        ["POST /unread HTTP/1.1\r\nHost: a\r\nContent-Length: 900000\r\n\r\n", "POST / HTTP/1.1\r\n\r\n"]
    {
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let served = serve(listener.accept().await.unwrap().0, limits);
        client.write_all(request.as_bytes()).await.unwrap();
        // The answer and the end of the server's writing are there before the body is sent.
        let mut answer = vec![0; 1];
        client.peek(&mut answer).await.unwrap();
        for _ in 0..9 {
            client.write_all(&[b'x'; 100_000]).await.unwrap();
            tokio::task::yield_now().await;
        }
        assert!(read_all(&mut client).await.starts_with("HTTP/1.1 "), "{request}");
        client.shutdown().await.unwrap();
        let _ = served.connection.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn lingering_ends_after_its_bytes() {
    let limits = Limits { linger: Duration::from_secs(600), linger_bytes: 100_000, ..Limits::default() };
    let (mut client, served) = connect(limits);
    client.write_all(b"\n").await.unwrap();
    read_response(&mut client).await;
    client.write_all(&[0; 99_999]).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    assert!(!served.connection.is_finished());
    client.write_all(&[0; 1]).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    assert!(served.connection.is_finished());
}

#[tokio::test(start_paused = true)]
async fn http2_passes_and_idles_out() {
    let (client, served) = connect(Limits::default());
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(client)).await.unwrap();
    let connection = tokio::spawn(connection);
    for (path, expected) in [("/paused", "..."), ("/a", "echo"), ("/slow", "slow")] {
        let request =
            http::Request::post(format!("http://a{path}")).body(Full::new(Bytes::from("echo"))).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, expected);
    }
    let start = Instant::now();
    let _ = connection.await.unwrap();
    let counts = served.counts();
    let _ = served.connection.await.unwrap();
    assert_eq!(start.elapsed().as_secs(), 75);
    assert_eq!(counts, (3, 0));
}

#[tokio::test]
async fn vectored_writes_reach_the_socket_as_such() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let mut guard =
        Guard::new(listener.accept().await.unwrap().0, Limits::default(), Arc::new(|_| Bytes::new()));
    assert!(guard.is_write_vectored());
    let parts = [IoSlice::new(b"one "), IoSlice::new(b"two")];
    assert_eq!(guard.write_vectored(&parts).await.unwrap(), 7);
    drop(guard);
    assert_eq!(read_all(&mut client).await, "one two");
}

/// How many requests come before one about what is no URI, which ends the connection; `None`: there is none such.
fn before_no_uri(stream: &[u8]) -> Option<u64> {
    let mut scanner = Scanner::new(32 * 1024, 100);
    for (at, byte) in stream.iter().enumerate() {
        scanner.feed(&[*byte]).ok()?;
        if let Some(head) = scanner.take() {
            let start = at + 1 - head.bytes;
            let target = &stream[start + head.target.start..start + head.target.end];
            if Target::parse(Bytes::copy_from_slice(target)).is_none() {
                return Some(scanner.heads() - 1);
            }
        }
    }
    None
}

proptest! {
    /// Whatever the guard lets through, both divide into the same requests.
    #[test]
    fn servers_see_as_many_requests_as_the_scanner(
        requests in proptest::collection::vec("POST /[a-z] HTTP/1.1\r\nHost: a\r\n(Content-Length: 5\r\n\r\nabcde|Transfer-Encoding: chunked\r\n\r\n(2\r\nab\r\n|3;e\r\nGET\r\n){0,2}0\r\n(T: r\r\n)?\r\n)", 1..4),
        changes in proptest::collection::vec(
            (any::<prop::sample::Index>(), prop_oneof![Just(b'\r'), Just(b'\n'), Just(b' '), Just(b'0'), any::<u8>()], 0..3),
            0..3
        ),
    ) {
        let mut stream = requests.concat().into_bytes();
        for (at, byte, how) in changes {
            let at = at.index(stream.len());
            match how {
                0 => stream[at] = byte,
                1 => stream.insert(at, byte),
                _ => drop(stream.remove(at)),
            }
        }
        let mut scanner = Scanner::new(32 * 1024, 100);
        let verdict = scanner.feed(&stream);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        for server in [Server::Hyper, Server::Ours] {
            let (served, refused) = runtime.block_on(async {
                let (mut client, socket) = duplex(64 * 1024);
                let served = serve_by(server, socket, Limits::default());
                client.write_all(&stream).await.unwrap();
                // A client that half-closes ends what is under way, so wait.
                sleep(Duration::from_secs(1)).await;
                drop(client);
                let counts = served.counts();
                let _ = served.connection.await;
                counts
            });
            // An HTTP/1.0 request ends the connection.
            let shown = stream.escape_ascii();
            if let Some(before) = before_no_uri(&stream) {
                prop_assert_eq!(served as u64, before, "{:?}: {}", server, shown);
                if let Server::Ours = server {
                    prop_assert_eq!(refused, 1, "{}", shown);
                }
            } else if !stream.windows(4).any(|window| window == b"/1.0") {
                prop_assert_eq!(served as u64, scanner.heads(), "{:?}: {}", server, shown);
                prop_assert_eq!(refused, usize::from(verdict.is_err()), "{:?}: {}", server, shown);
            }
        }
    }
}
