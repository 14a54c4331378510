{{/* One release for each cluster: agents of two would filter the same pods. So names are fixed, and a second one is refused. */}}
{{- define "egress-agent.labels" -}}
app.kubernetes.io/name: egress-agent
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}
