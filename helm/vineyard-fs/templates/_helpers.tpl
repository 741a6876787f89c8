{{- define "vineyard-fs.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "vineyard-fs.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "vineyard-fs.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "vineyard-fs.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "vineyard-fs.selector" -}}
app.kubernetes.io/name: {{ include "vineyard-fs.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "vineyard-fs.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "vineyard-fs.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: vineyard
{{- end }}

{{- /* More labels, which a value gives. One that the chart sets would be there twice, and pods would not be found by it. */}}
{{- define "vineyard-fs.moreLabels" -}}
{{- $own := append (keys (include "vineyard-fs.labels" .root | fromYaml)) "app.kubernetes.io/component" }}
{{- range keys .labels | sortAlpha }}
{{- if has . $own }}
{{- fail (printf "%s: the label %s is set by the chart itself" $.value .) }}
{{- end }}
{{- end }}
{{- toYaml .labels }}
{{- end }}

{{- define "vineyard-fs.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "vineyard-fs.stateDir" -}}
{{ .Values.kubeletDir }}/plugins/fs.vineyard.v6d.io
{{- end }}

{{- /* The vineyardd of volumes that name none, or nothing. */}}
{{- define "vineyard-fs.defaultVineyard" -}}
{{- if .Values.defaultVineyard }}
{{- .Values.defaultVineyard }}
{{- else if .Values.vineyardd.enabled }}
{{- printf "%s/%s" .Release.Namespace .Values.vineyardd.name }}
{{- end }}
{{- end }}

{{- /* What both DaemonSets of the driver have in their pods. */}}
{{- define "vineyard-fs.pod" -}}
serviceAccountName: {{ include "vineyard-fs.fullname" . }}
automountServiceAccountToken: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
