//! The body of an answer, with the meter of its request.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::meter::Meter;

pin_project! {
    /// A body that lets go of its request's [`Meter`] when its last byte was taken, or it is dropped before.
    #[derive(Debug)]
    pub struct MeteredBody<B> {
        #[pin]
        body: B,
        meter: Option<Meter>,
    }
}

impl<B> MeteredBody<B> {
    pub(super) fn new(body: B, meter: Option<Meter>) -> MeteredBody<B> {
        MeteredBody { body, meter }
    }
}

impl<B: Body> Body for MeteredBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let frame = ready!(this.body.poll_frame(context));
        if !matches!(frame, Some(Ok(_))) {
            *this.meter = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
