//! The endpoints of OpenAI's API that the gateway serves.

/// One endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    ChatCompletions,
    /// `/v1/completions`
    Completions,
    /// `/v1/embeddings`
    Embeddings,
    /// `/v1/moderations`
    Moderations,
    /// `/v1/images/generations`
    ImagesGenerations,
    /// `/v1/images/edits`
    ImagesEdits,
    /// `/v1/audio/transcriptions`
    AudioTranscriptions,
    /// `/v1/audio/translations`
    AudioTranslations,
    /// `/v1/audio/speech`
    AudioSpeech,
    /// `/v1/rerank`
    Rerank,
}

/// How an endpoint takes its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `application/json`
    Json,
    /// `multipart/form-data`
    Multipart,
    /// Whichever the content type says.
    Either,
}

impl Endpoint {
    /// Every endpoint.
    pub const ALL: [Endpoint; 10] = [
        Endpoint::ChatCompletions,
        Endpoint::Completions,
        Endpoint::Embeddings,
        Endpoint::Moderations,
        Endpoint::ImagesGenerations,
        Endpoint::ImagesEdits,
        Endpoint::AudioTranscriptions,
        Endpoint::AudioTranslations,
        Endpoint::AudioSpeech,
        Endpoint::Rerank,
    ];

    /// The canonical path, as limits and metrics name it.
    pub const fn route(self) -> &'static str {
        match self {
            Endpoint::ChatCompletions => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
            Endpoint::Embeddings => "/v1/embeddings",
            Endpoint::Moderations => "/v1/moderations",
            Endpoint::ImagesGenerations => "/v1/images/generations",
            Endpoint::ImagesEdits => "/v1/images/edits",
            Endpoint::AudioTranscriptions => "/v1/audio/transcriptions",
            Endpoint::AudioTranslations => "/v1/audio/translations",
            Endpoint::AudioSpeech => "/v1/audio/speech",
            Endpoint::Rerank => "/v1/rerank",
        }
    }

    /// The path to append to a provider's base.
    pub fn upstream_path(self) -> &'static str {
        &self.route()["/v1".len()..]
    }

    /// How its body comes.
    pub fn form(self) -> Form {
        match self {
            Endpoint::ImagesEdits => Form::Either,
            Endpoint::AudioTranscriptions | Endpoint::AudioTranslations => Form::Multipart,
            _ => Form::Json,
        }
    }

    /// Whether its streams report usage when `stream_options.include_usage` asks for it.
    pub fn streams(self) -> bool {
        matches!(self, Endpoint::ChatCompletions | Endpoint::Completions)
    }

    /// Whether a model reads text here and is paid by the token; audio, images and video reserve none.
    pub fn reads_text(self) -> bool {
        match self {
            Endpoint::ChatCompletions
            | Endpoint::Completions
            | Endpoint::Embeddings
            | Endpoint::Moderations
            | Endpoint::Rerank => true,
            Endpoint::ImagesGenerations
            | Endpoint::ImagesEdits
            | Endpoint::AudioTranscriptions
            | Endpoint::AudioTranslations
            | Endpoint::AudioSpeech => false,
        }
    }

    /// Whether a model writes text here.
    pub fn writes_text(self) -> bool {
        matches!(self, Endpoint::ChatCompletions | Endpoint::Completions)
    }
}
